"""Reading features in training, in place of encoding the samples."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from configs.errors import PipelineError, ShardError, SourceError
from configs.training import TrainConfig
from stages.storage import layout
from stages.storage.samples import DAMAGED, PARSING
from stages.storage.store import Store
from train.cache import SampleCache, open_cache
from train.features.kinds import KINDS, MEMBER, Kind
from train.mixture import Mixture
from train.shards import ShardSet

logger = logging.getLogger(__name__)

_REMAKE: Final = "Delete its tar, and run make features again."


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """The features of one kind, for all samples of a mixture.

    parts: of each data set. name: of their folder in each, and a digest of their contents. A
    sample's features have kind.shape.
    """

    kind: Kind
    name: str
    mixture: Mixture
    parts: tuple[ShardSet, ...]

    def blank(self) -> Tensor:
        """Returns zeros of the shape and type of a sample's features."""
        return torch.from_numpy(np.zeros(self.kind.shape, self.kind.dtype))

    def read(self, numbers: Sequence[int], *, verify: bool = True) -> dict[int, Any]:
        """Returns number → features of those samples, as `Kind.restored` returns them; for a
        damaged one, a ShardError. Raises ShardError if a tar is missing.
        """
        features: dict[int, Any] = {}
        by_part: dict[int, list[tuple[int, int]]] = {}
        for number in numbers:
            part, key = self.mixture.source_of(number)
            own = self.parts[part].number(key)
            if own is None:
                text = f"{self.parts[part].data} has no features of {key}. Run make features again."
                features[number] = ShardError(text)
            else:
                by_part.setdefault(part, []).append((number, own))
        for part, pairs in by_part.items():
            read = self.parts[part].members([own for _, own in pairs], verify=verify)
            for (number, _), members in zip(pairs, read, strict=True):
                features[number] = self._parsed(members, self.parts[part].data)
        return features

    def _parsed(self, members: dict[str, bytes] | ShardError, place: str) -> Any:
        if isinstance(members, ShardError):
            return ShardError(f"{str(members).partition('. ')[0]}. {_REMAKE}")
        try:
            with PARSING:
                values = np.load(io.BytesIO(members[MEMBER]), allow_pickle=False)
            self.kind.check(values)
            return self.kind.restored(values)
        except (*DAMAGED, OSError) as error:
            return ShardError(f"{place}: features can't be read ({error}). {_REMAKE}")


def open_features(
    config: TrainConfig,
    mixture: Mixture,
    index_folder: Path | None,
    message: Callable[[str], None],
) -> dict[str, FeatureSet]:
    """Returns kind → its features, of the kinds that fit the settings and all samples. message: is
    told which are read, and why others aren't.
    """
    if not config.features.use:
        return {}
    sets_by_kind, cache = {}, open_cache(config)
    for name in KINDS:
        folders = [_kinds_in(source.path, name) for source in config.data]
        if not any(folders):
            continue
        try:
            kind = KINDS[name](config)
            sets = [
                _open(source.path, kind, own, part, index_folder, cache)
                for source, own, part in zip(config.data, folders, mixture.parts, strict=True)
            ]
        except PipelineError as error:
            message(f"features: {name} isn't used, and is computed in each step: {error}")
            continue
        contents = hashlib.sha256("".join(each.digest for each in sets).encode()).hexdigest()
        sets_by_kind[name] = FeatureSet(kind, f"{kind.folder}@{contents[:8]}", mixture, tuple(sets))
        message(
            f"features: {name} is read ({config.features.dtype}, up to "
            f"{kind.bytes_per_sample:,} bytes a sample), and {kind.use}"
        )
    return sets_by_kind


def _kinds_in(data: str, kind: str) -> list[str]:
    """Returns the names of the folders with features of a kind."""
    names = Store(data).names(layout.FEATURES)
    return [name for name in names if name.startswith(f"{kind}-")]


def _open(
    data: str,
    kind: Kind,
    folders: Sequence[str],
    samples: ShardSet,
    index_folder: Path | None,
    cache: SampleCache | None,
) -> ShardSet:
    """Returns the features of a data set. Raises ShardError if there are none that fit."""
    name, store = kind.folder, Store(data)
    if name not in folders:
        raise ShardError(_difference(store, kind, folders))
    url = f"{data.rstrip('/')}/{layout.FEATURES}/{name}"
    try:
        features = ShardSet(url, "all", index_folder, cache)
    except (ShardError, SourceError) as error:
        raise ShardError(f"{url} is damaged or incomplete. Run make features again.") from error
    stale = [i for i, digest in samples.tars.items() if features.made_from.get(i) != digest]
    if stale:
        raise ShardError(
            f"{url} has no features of the present samples of {len(stale)} of "
            f"{len(samples.tars)} shards, the first is {layout.shard_name(stale[0])}. Run make "
            "features: it computes what is missing."
        )
    return features


def _difference(store: Store, kind: Kind, folders: Sequence[str]) -> str:
    """Says in what the features that are there differ from those that would fit."""
    expected = kind.description
    if not folders:
        return f"{store.url} has none. Run make features."
    path = f"{layout.FEATURES}/{folders[0]}/{layout.FEATURES_INFO}"
    try:
        stored: dict[str, Any] = json.loads(store.read(path))
    except (OSError, ValueError) as error:
        return f"{store.url}/{path} can't be read ({error}). Run make features again."
    differences = [
        f"{name} {stored.get(name)!r}, this run needs {value!r}"
        for name, value in expected.items()
        if stored.get(name) != value
    ]
    return f"{store.url}/{layout.FEATURES}/{folders[0]} has {'; '.join(differences)}"
