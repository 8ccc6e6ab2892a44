"""Mixture: the samples of one or several data sets, numbered through all of them.

The trainer reads samples through it only, whether there is one data set or more.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from configs.errors import ConfigError, ShardError
from configs.training import DataSource, TrainConfig
from model.pixels import Size
from model.spec import Embedder
from stages.record import Record
from stages.storage import layout
from stages.storage.reader import DatasetReader
from train.buckets import BucketOrder, Buckets, chosen_buckets
from train.cache import SampleCache, open_cache
from train.order import Order, SampleOrder
from train.pairs import Pairs
from train.shards import ShardSet

_FACE_STAGES: Final = ("detect", "parse", "embed")  # whose results must be comparable


class Mixture:
    """Every sample on one side of the split of each data set, in the order in which they are given.

    A sample that two data sets have under one key is two samples. Two samples are of one person
    only within a data set, since each data set clusters its people by itself.

    pair_prob: share of samples that are conditioned on another one of the same person.
    index_folder: local folder for the data sets' indexes; None makes them in a temporary folder.
    cache: for the samples of remote data sets.

    parts: the samples of each data set. digest: equal digests mean that an equal seed gives the
    same sequence of samples and pairs. digests, index_files: of each data set's samples. Raises
    what ShardSet raises; ConfigError if the data sets were made with different models for the face,
    or if pairs are asked for and there are none.
    """

    def __init__(
        self,
        data: Sequence[DataSource],
        split: str = "all",
        *,
        pair_prob: float = 0.0,
        index_folder: Path | None = None,
        cache: SampleCache | None = None,
    ) -> None:
        self._paths, self._pair_prob = [source.path for source in data], pair_prob
        self.parts = [ShardSet(path, split, index_folder, cache) for path in self._paths]
        if len(data) > 1:
            _check_face_models({path: _face_models(path) for path in self._paths})
        self._sizes = [len(part) for part in self.parts]
        self._first = [0, *accumulate(self._sizes)]  # number of each data set's first sample
        weights = [source.weight for source in data if source.weight is not None]
        self._weights = weights or None
        self._slots = SampleOrder(self._sizes, 0, self._weights).slots
        self.digests: Final = tuple(part.digest for part in self.parts)
        self.index_files: Final = tuple(part.index_file for part in self.parts)
        self.digest: Final = self._digest()
        if pair_prob and not self.with_others:
            raise ConfigError(
                f"pair_prob={pair_prob:g} needs people with at least two samples, and {self} has "
                f"none with split={split}. A data set knows its people when make dataset has run "
                "to its end and written identities.parquet. Set pair_prob=0, or add photographs of "
                "the same people."
            )

    def __len__(self) -> int:
        return self._first[-1]

    def __str__(self) -> str:
        return ", ".join(self._paths)

    def buckets(self, sizes: Sequence[Size], batch: int) -> Buckets:
        """Returns the samples in buckets. sizes: of those that are possible. batch: samples of a
        step.
        """
        pixels = [part.pixels() for part in self.parts]
        return chosen_buckets(pixels, self._slots, sizes, batch)

    def order(self, seed: int, buckets: Buckets | None = None) -> Order:
        """Returns the order in which the samples are trained on."""
        if buckets is not None:
            return BucketOrder(buckets, self._sizes, self._slots, seed)
        return SampleOrder(self._sizes, seed, self._weights)

    def pairs(self, order: Order) -> Pairs:
        """Returns which samples give the conditions."""
        return Pairs(order, self.others, self._pair_prob)

    def key(self, number: int) -> str:
        """Returns the key of a sample. It is unique within its data set."""
        part, own = self._place(number)
        return self.parts[part].key(own)

    def source_of(self, number: int) -> tuple[int, str]:
        """Returns the place of a sample's data set among all, and its key there."""
        part, own = self._place(number)
        return part, self.parts[part].key(own)

    def numbers(self, key: str) -> list[int]:
        """Returns the numbers of the samples with this key: one for each data set that has it."""
        own = [part.number(key) for part in self.parts]
        return [
            first + number
            for first, number in zip(self._first, own, strict=False)
            if number is not None
        ]

    def others(self, number: int) -> list[int]:
        """Returns the numbers of the other samples of the same person, ascending. They are on the
        same side of the split; [] if the data set isn't split.
        """
        part, own = self._place(number)
        return [self._first[part] + other for other in self.parts[part].others(own)]

    @cached_property
    def with_others(self) -> int:
        """How many samples have another of the same person."""
        return sum(part.with_others() for part in self.parts)

    def records(self, numbers: Sequence[int], *, verify: bool = True) -> list[Record | ShardError]:
        """Returns the records of those samples, in that order; for a damaged one, the error. Those
        of one data set are fetched together.

        verify: compare the bytes of each with its digest. Raises ShardError if a tar is missing.
        """
        places = [self._place(number) for number in numbers]
        records: dict[tuple[int, int], Record | ShardError] = {}
        for part in sorted({part for part, _ in places}):
            own = [number for index, number in places if index == part]
            read = self.parts[part].records(own, verify=verify)
            records |= {(part, n): record for n, record in zip(own, read, strict=True)}
        return [records[place] for place in places]

    def shard_of(self, number: int) -> str:
        """Returns the name of the tar that has the sample; of several data sets, its path."""
        part, own = self._place(number)
        return shard_name(self.parts[part].shard_of(own), self._paths[part], len(self.parts))

    def keys_at(self, order: Order, position: int) -> tuple[str, str]:
        """Returns the keys of the sample at a position and of its reference."""
        reference = self.pairs(order).reference(position)
        return self.key(order.sample(position)), self.key(reference)

    def name(self, number: int) -> tuple[str, str]:
        """Returns key and shard of a sample, which name it among all data sets."""
        return self.key(number), self.shard_of(number)

    def dataset_config(self) -> str:
        """Returns the first data set's own configuration, as YAML; "" if it has none. Inference
        runs its stages.
        """
        return self.parts[0].dataset_config()

    def embedder(self) -> Embedder | None:
        """Returns the model that computed the identities, which is one for all data sets; None if
        the first one's files don't state it.
        """
        reader = DatasetReader(self._paths[0])
        info, config = reader.dataset_info(), reader.config_values()
        try:
            name = config["embed"]["weights"]
            return Embedder(name=name, sha256=_weights_digests(info)[name])
        except (AttributeError, KeyError, TypeError, ValueError):
            return None

    def check_step(self, size: int) -> None:
        """Raises ConfigError if a step of `size` samples has some of them twice: if all data sets
        together have fewer, or one of them has fewer than its share of a step.
        """
        if len(self) < size:
            raise ConfigError(
                f"{self} has {len(self)} samples, fewer than global_batch_size={size}: a step "
                "would train on some of them twice. Lower global_batch_size, or make a larger data "
                "set."
            )
        for path, own, share in zip(self._paths, self._sizes, self._shares(), strict=True):
            if own < share * size:
                raise ConfigError(
                    f"{path} has {own} samples, fewer than its share of a step, "
                    f"{share * size:.1f} of global_batch_size={size}: steps would train on some of "
                    "them twice. Lower its weight or global_batch_size."
                )

    def message(self) -> str:
        """Returns a line for the user: the samples and shares of several data sets, and how many
        samples can be half of a pair; "" for one data set without pairs.
        """
        parts = []
        if len(self.parts) > 1:
            parts = [
                f"{path}: {own:,} samples, {share:.1%} of the positions"
                for path, own, share in zip(self._paths, self._sizes, self._shares(), strict=True)
            ]
        if self._pair_prob:
            parts.append(
                f"{self.with_others:,} of {len(self):,} samples have another of the same person"
            )
        return "; ".join(parts)

    def _shares(self) -> list[float]:
        return [slots / sum(self._slots) for slots in self._slots]

    def _place(self, number: int) -> tuple[int, int]:
        """Returns the data set of a sample, and its number there."""
        part = bisect_right(self._first, number) - 1
        return part, number - self._first[part]

    def _digest(self) -> str:
        if len(self.parts) == 1 and not self._pair_prob:
            return self.digests[0]
        lines = [f"{each} {slots}\n" for each, slots in zip(self.digests, self._slots, strict=True)]
        if self._pair_prob:
            lines += [f"{part.people_digest()}\n" for part in self.parts]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def shard_name(tar: str, path: str, count: int) -> str:
    """Returns the name of a tar in messages. path: of its data set. count: of data sets."""
    return tar if count == 1 else f"{path}/shards/{tar}"


def open_mixture(config: TrainConfig, index_folder: Path | None = None) -> Mixture:
    """Opens the data sets of a run. Raises what Mixture raises."""
    return Mixture(
        config.data,
        config.split,
        pair_prob=config.pair_prob,
        index_folder=index_folder,
        cache=open_cache(config),
    )


def _face_models(path: str) -> dict[str, str]:
    """Returns stage → backend, version and weights with which a data set's faces were detected,
    parsed and embedded. Raises ShardError if the data set's files don't state it.
    """
    reader = DatasetReader(path)
    try:
        return _stated_models(reader.dataset_info(), reader.config_values())
    except (AttributeError, KeyError, TypeError) as error:
        raise ShardError(
            f"{path}: {layout.DATASET} and {layout.CONFIG} don't state its stages "
            f"({type(error).__name__}: {error}). {layout.how_to_repair(layout.DATASET)}"
        ) from error


def _stated_models(info: dict[str, Any], config: dict[str, Any]) -> dict[str, str]:
    """info, config: contents of dataset.json and config.yaml."""
    signatures = dict(zip(info["stages"], info["signatures"], strict=False))
    digests = _weights_digests(info)
    models = {}
    for stage in _FACE_STAGES:
        backend, weights = info["backends"][stage], config[stage]["weights"]
        version = signatures[stage].removeprefix(f"{stage}-").partition("-")[0]
        models[stage] = f"{backend} {version} {weights} {digests[weights][:12]}"
    return models


def _weights_digests(info: dict[str, Any]) -> dict[str, str]:
    """Returns name → sha256 of the weights files. info: contents of dataset.json."""
    return {each["name"]: each["sha256"] for each in info["weights"]}


def _check_face_models(models: dict[str, dict[str, str]]) -> None:
    """models: path → what _face_models returns. Raises ConfigError if they differ."""
    (first, expected), *others = models.items()
    differences = [
        f"{stage}: {expected[stage]} in {first}, {models[stage]} in {path}"
        for path, models in others
        for stage in _FACE_STAGES
        if models[stage] != expected[stage]
    ]
    if differences:
        raise ConfigError(
            "the data sets were made with different models for the face, so their regions and "
            f"identity embeddings can't be compared. {'; '.join(differences)}. Make them with the "
            "same settings: make dataset with the new ones runs these stages again."
        )
