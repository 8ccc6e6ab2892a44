"""`python -m train.cli features`: computes features of all samples, by any executor.

A shard of features is committed as one of a data set, so the same command goes on after a kill, and
computes only what is missing or was made of other samples.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import numpy as np

from configs.errors import ConfigError, ShardError
from configs.load import load_text, to_yaml
from configs.training import TrainConfig
from stages.backends.runtime import deterministic_algorithms, torch_device
from stages.base import PendingRecord, Stage
from stages.executors import executor_named
from stages.executors.job import ChainReference, ExecutorSettings
from stages.fields import Annotation
from stages.record import Record, Status
from stages.storage import layout
from stages.storage.commit import (
    ChainInfo,
    PlannedShard,
    commit,
    complete_commits,
    remove_features,
)
from stages.storage.lock import RunLock
from stages.storage.manifest import Manifest, ShardRun
from stages.storage.reader import DatasetReader, SamplePlace
from stages.storage.store import Store
from train.features.kinds import KINDS, MEMBER, Kind
from train.setup import check_device

_READ: Final = 64  # samples that are read together


class FeatureWatcher(Protocol):
    """Receives the messages and the progress."""

    def message(self, text: str) -> None:
        """Called with a line for the user."""
        ...

    def start(self, name: str, step: int, total: int, batch_size: int, unit: str) -> None:
        """Called before the first sample of a kind. step: how many samples have features."""
        ...

    def step(self, step: int, losses: dict[str, float] | None) -> None:
        """Called with the number of samples that have features."""
        ...


class FeatureStage(Stage):
    """Replaces the image of each record by its features, as the bytes of an .npy file."""

    name = "features"
    requires = ("image", "parsing", "identity", "caption", "face_caption")
    provides = ("image",)

    def __init__(self, kind: Kind) -> None:
        super().__init__(kind.config.features)
        self._kind, self._encoder = kind, None
        self._device = ""

    def setup(self) -> None:
        if self._encoder is None:
            self._device = torch_device(self._kind.config.model.device)
            self._encoder = self._kind.load(self._device)

    def process(self, records: list[Record]) -> list[Record]:
        try:
            with deterministic_algorithms(True):
                encoded = self._kind.encode(self._encoder, records, self._device)
        except (ValueError, OSError) as error:  # Pillow's errors are OSErrors
            keys = ", ".join(record.key for record in records)
            raise ShardError(
                f"{keys} can't be encoded ({error}). `lint` says whether the data set is damaged."
            ) from error
        return [
            replace(record, image=_npy(self._kind.stored(features)))
            for record, features in zip(records, encoded, strict=True)
        ]


def _npy(values: Any) -> bytes:
    with io.BytesIO() as out:
        np.save(out, values, allow_pickle=False)
        return out.getvalue()


def build_from_text(text: str) -> list[Stage]:
    """Returns the stages that compute a kind: its name is on the first line, then the settings."""
    name, _, config = text.partition("\n")
    return [FeatureStage(KINDS[name](load_text(TrainConfig, config)))]


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureTask:
    """A shard of the data set. bytes: of its samples and their features, which are in memory
    together. tar: digest of its tar.
    """

    index: int
    inputs: int
    bytes: int
    tar: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureJob:
    """A stages.executors.job.ShardJob. data: the data set. output: where the features go."""

    config: TrainConfig
    kind: str
    data: str
    output: str

    @property
    def settings(self) -> ExecutorSettings:
        features = self.config.features
        return ExecutorSettings(
            threads=self.config.threads, stuck_after=features.stuck_after, ray=features.ray
        )

    @property
    def chain(self) -> ChainReference:
        text = f"{self.kind}\n{to_yaml(self.config)}"
        return ChainReference("train.features.make:build_from_text", text)

    def load(self, task: FeatureTask, stages: Sequence[Stage]) -> Iterator[PendingRecord]:
        names = frozenset(stage.name for stage in stages)
        reader = DatasetReader(self.data)
        columns = ("key", "tar_offset", "tar_size", "sample_sha256")
        rows = reader.rows(task.index, columns, Status.OK).sort_by("tar_offset").to_pylist()
        tar = layout.tar(task.index)
        for start in range(0, len(rows), _READ):
            places = [
                SamplePlace(r["key"], tar, r["tar_offset"], r["tar_size"], r["sample_sha256"] or "")
                for r in rows[start : start + _READ]
            ]
            for data, place in zip(reader.parts_at(places), places, strict=True):
                record = reader.sample_in(data, place, verify=True)
                if isinstance(record, ShardError):
                    raise record
                yield PendingRecord(record, names)

    def commit(self, task: FeatureTask, records: Sequence[Record], run: ShardRun) -> Manifest:
        if failed := [each for each in records if not each.ok]:
            raise ShardError(
                f"{self.data}: features of sample {failed[0].key} can't be computed: "
                f"{failed[0].reason} {failed[0].detail}"
            )
        # without what else is known of the people
        bare = [Record(key=each.key, source="", image=each.image) for each in records]
        shard = PlannedShard(index=task.index, inputs=len(bare), bytes=0, digest=task.tar)
        info = ChainInfo(signatures=(f"features-{self.kind}",), annotations=())
        return commit(Store(self.output), shard, bare, info, run.finish(), _members)


def _members(record: Record, _annotations: Sequence[type[Annotation]]) -> dict[str, bytes]:
    return {MEMBER: record.image}


def make_features(config: TrainConfig, watcher: FeatureWatcher) -> list[str]:
    """Computes the features of `config.features.kinds` for each data set, where they are missing
    or were made of other samples. Returns the folders.

    Raises ConfigError if there is no data set or not enough space, WeightsError if an encoder can't
    be loaded, ShardError for a damaged sample.
    """
    paths = [source.path for source in config.data if source.path]
    if not paths:
        raise ConfigError("data is empty. Set data=OUT, the output of make dataset.")
    check_device(config)
    kinds = [KINDS[name](config) for name in dict.fromkeys(config.features.kinds)]
    return [_make(path, kind, watcher) for path in paths for kind in kinds]


def _make(data: str, kind: Kind, watcher: FeatureWatcher) -> str:
    reader = DatasetReader(data)
    if not reader.store.names(layout.SHARDS):
        raise ConfigError(
            f"{data}: no samples there. Run make dataset first, then give its output."
        )
    output = f"{data.rstrip('/')}/{layout.FEATURES}/{kind.folder}"
    store = Store(output)
    # nothing may be removed from the data set meanwhile: its features would be made after that
    with RunLock(reader.store), RunLock(store):
        manifests = {i: each for i, each in reader.manifests().items() if each.written}
        complete_commits(store)
        store.write_if_changed(layout.FEATURES_INFO, json.dumps(kind.description, indent=1) + "\n")
        current = _digests(store)
        for index in current.keys() - manifests.keys():
            remove_features(reader.store, index)
        tasks = [
            FeatureTask(
                index=index,
                inputs=m.written,
                bytes=m.tar.bytes + m.written * kind.bytes_per_sample,
                tar=m.tar.sha256,
            )
            for index, m in manifests.items()
            if current.get(index) != m.tar.sha256
        ]
        total = sum(manifest.written for manifest in manifests.values())
        samples = sum(task.inputs for task in tasks)
        if not tasks:
            watcher.message(f"{output} is complete: {total:,} samples")
            return output
        _check_space(store, kind, samples, watcher)
        watcher.start(kind.name, total - samples, total, 1, "sample")
        done = total - samples

        def advance(count: int) -> None:
            nonlocal done
            done += count
            watcher.step(done, {})

        job = FeatureJob(config=kind.config, kind=kind.name, data=data, output=output)
        for _ in executor_named(kind.config.features.executor)(job, tasks, advance):
            pass
    watcher.message(f"{output}: features of {total:,} samples")
    return output


def _digests(store: Store) -> dict[int, str]:
    """Returns number → digest of the data set's tar, of each shard of features that is whole."""
    sizes = store.sizes(layout.SHARDS)
    return {
        index: manifest.inputs_digest
        for index, manifest in DatasetReader(store).manifests(readable_only=True).items()
        if all(sizes.get(file.name) == file.bytes for file in manifest.files)
    }


def _check_space(store: Store, kind: Kind, samples: int, watcher: FeatureWatcher) -> None:
    """Says how much space the features take. Raises ConfigError if the disk has less."""
    needed = kind.bytes_per_sample * samples
    watcher.message(
        f"features: {kind.name} of {samples:,} samples take up to {_size(needed)} in {store.url} "
        f"({_size(kind.bytes_per_sample)} a sample)"
    )
    if store.local and (free := shutil.disk_usage(store.path("")).free) < needed:
        raise ConfigError(
            f"{store.url}: the features need {_size(needed)}, and the disk has {_size(free)} free. "
            "Free space, or compute fewer kinds (features.kinds) or smaller ones "
            "(features.dtype=float16)."
        )


def _size(count: float) -> str:
    """Returns a number of bytes with a unit, such as 34.2 GB."""
    power = 0
    while count >= 1000 and power < 4:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {('B', 'KB', 'MB', 'GB', 'TB')[power]}"
