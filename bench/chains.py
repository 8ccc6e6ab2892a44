"""Chains for benchmarks and tests: stages that sleep in place of computing, and resize alone."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Final

import numpy as np

from configs.common import NOT_HASHED, PlacementConfig
from configs.schema import DatasetConfig
from stages.base import Stage
from stages.codec import encode_labels
from stages.record import IDENTITY_DIM, Face, Record
from stages.resize import ResizeStage

SECONDS: Final = {
    "resize": 0.0111,
    "detect": 0.0286,
    "parse": 0.2615,
    "embed": 0.0184,
    "caption": 0.0214,
}
"""Seconds for an image in each stage of the inline pipeline, from `make bench` on two cores."""

# Coordinates are floats, as a detector's; Arrow would convert integers to floats.
_FACE: Final = Face(
    box=(8.0, 8.0, 56.0, 56.0),
    landmarks=((20.0, 24.0), (44.0, 24.0), (32.0, 36.0), (22.0, 46.0), (42.0, 46.0)),
    score=0.9,
)


@dataclass(frozen=True, slots=True)
class SleepConfig:
    """Settings of a SleepStage. seconds: for an image."""

    seconds: float
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NOT_HASHED)


class SleepStage(Stage):
    """Sleeps for `seconds` an image and returns the records unchanged."""

    config: SleepConfig

    def process(self, records: list[Record]) -> list[Record]:
        time.sleep(self.config.seconds * len(records))
        return records


class Resize(SleepStage):
    name = "resize"
    provides = ("image", "width", "height")


class Detect(SleepStage):
    name = "detect"
    provides = ("faces", "face")


class Parse(SleepStage):
    name = "parse"
    provides = ("parsing",)


class Embed(SleepStage):
    name = "embed"
    provides = ("identity",)


class Caption(SleepStage):
    name = "caption"
    provides = ("caption", "face_caption")


class Fill(Stage):
    """Fills the fields that a sample must have with constants, so that its shard can be written."""

    name = "fill"
    provides = ("parsing", "identity", "faces", "face")

    def process(self, records: list[Record]) -> list[Record]:
        return [_filled(record) for record in records]


def sleeping(config: DatasetConfig) -> list[Stage]:
    """Builds a chain that takes as long as the real one and has its placement, but only sleeps."""
    kinds = (Resize, Detect, Parse, Embed, Caption)
    stages: list[Stage] = [
        kind(SleepConfig(SECONDS[kind.name], config.resize.placement)) for kind in kinds
    ]
    return [*stages, Fill(SleepConfig(0.0, config.resize.placement))]


def resizing(config: DatasetConfig) -> list[Stage]:
    """Builds a chain of the resize stage alone, with constants for what other stages provide."""
    return [ResizeStage(config.resize), Fill(SleepConfig(0.0, config.resize.placement))]


def _filled(record: Record) -> Record:
    width, height = record.width or 64, record.height or 64
    identity = np.full(IDENTITY_DIM, IDENTITY_DIM**-0.5, np.float32)
    return replace(
        record,
        width=width,
        height=height,
        parsing=_labels(width, height),
        identity=identity,
        faces=(_FACE,),
        face=0,
    )


@cache
def _labels(width: int, height: int) -> bytes:
    return encode_labels(np.zeros((height, width), np.uint8))
