"""Data sets with cached features, and trainings that read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.load import load
from configs.schema import DatasetConfig
from configs.training import FeaturesConfig, TrainConfig
from pipelines.chain import build_chain
from stages.codec import decode_labels, encode_labels
from stages.record import Record
from stages.regions import region_masks
from stages.storage.commit import ChainInfo, PlannedShard, commit
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.train.helpers import Steps, small
from train.features.make import make_features
from train.features.reading import FeatureSet, open_features
from train.history import read_lines
from train.mixture import open_mixture

KINDS = ("vae", "image", "text")
LONG = (
    "a round face with a high and broad forehead below a fringe of wavy brown hair, two small grey "
    "eyes that look past the camera below thick dark brows, a long and straight nose with a thin "
    "bridge, a wide mouth with full red lips that are slightly open, two ears with golden rings, "
    "a striped shirt with a wide collar, a garden with old trees behind the person"
)


def features(dtype: Any = "float32", **changes: Any) -> FeaturesConfig:
    values = {"kinds": KINDS, "dtype": dtype, **changes}
    return FeaturesConfig(**values)


def paired(data: Path, base: Path, output: Path, **changes: Any) -> TrainConfig:
    """Settings for four steps with pairs. Texts of pairs may be encoded, each alone."""
    values = {"pair_prob": 0.5, "max_train_steps": 4, "log_every": 1, "keep_features": 8}
    return small(data, base, output, **{**values, "features": features(), **changes})


def make(config: TrainConfig) -> list[Path]:
    return [Path(folder) for folder in make_features(config, Steps())]


def opened(config: TrainConfig) -> tuple[dict[str, FeatureSet], list[str]]:
    """What a run with these settings reads, by kind, and its messages."""
    messages: list[str] = []
    sets = open_features(config, open_mixture(config, None), None, messages.append)
    return sets, messages


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in read_lines(output / "losses.jsonl")]


def rewrite(data: Path, change: Callable[[Record], Record]) -> None:
    """Commits all shards of a data set again, with changed records."""
    reader = DatasetReader(Store(str(data)))
    settings = load(DatasetConfig, data / "config.yaml", [f"output={data}"])
    annotations = ChainInfo.of(build_chain(settings), signed=()).annotations
    for index, manifest in reader.manifests().items():
        records = [change(record) for record in reader.records(index)]
        shard = PlannedShard(
            index=index, inputs=manifest.inputs, bytes=0, digest=manifest.inputs_digest
        )
        commit(
            reader.store, shard, records, ChainInfo(manifest.signatures, annotations), manifest.run
        )


def without_a_mouth(record: Record) -> Record:
    """The record, whose label map shows no mouth and whose description is longer than a text."""
    labels = decode_labels(record.parsing).copy()
    labels[region_masks(labels, "corrected")["mouth"]] = 1  # skin
    return replace(record, parsing=encode_labels(labels), face_caption=LONG)
