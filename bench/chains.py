"""Chains for benchmarks: stages that wait where the real ones compute, and the resize stage alone."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Final

import numpy as np

from configs.common import NO_ANSWER, PlacementConfig
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
"""An image in each stage of the inline pipeline, as a run of `make bench` on two cores had it."""

# floats, as a detector's are: after a journey through Arrow they would be anyway
_FACE: Final = Face(
    box=(8.0, 8.0, 56.0, 56.0),
    landmarks=((20.0, 24.0), (44.0, 24.0), (32.0, 36.0), (22.0, 46.0), (42.0, 46.0)),
    score=0.9,
)


@dataclass(frozen=True, slots=True)
class SleepConfig:
    seconds: float  # an image
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NO_ANSWER)


class SleepStage(Stage):
    """Takes `seconds` an image and answers it as it came."""

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
    """What a sample must have and nothing here has made: constants, so that the shard can be
    committed.
    """

    name = "fill"
    provides = ("parsing", "identity", "faces", "face")

    def process(self, records: list[Record]) -> list[Record]:
        return [_filled(record) for record in records]


def sleeping(config: DatasetConfig) -> list[Stage]:
    """A Chain: the real chain's times and placement, nothing computed."""
    kinds = (Resize, Detect, Parse, Embed, Caption)
    stages: list[Stage] = [
        kind(SleepConfig(SECONDS[kind.name], config.resize.placement)) for kind in kinds
    ]
    return [*stages, Fill(SleepConfig(0.0, config.resize.placement))]


def resizing(config: DatasetConfig) -> list[Stage]:
    """A Chain: the resize stage alone, and constants for what the rest of the chain would have
    given.
    """
    return [ResizeStage(config.resize), Fill(SleepConfig(0.0, config.resize.placement))]


def _filled(record: Record) -> Record:
    width, height = record.width or 64, record.height or 64
    identity = np.full(IDENTITY_DIM, IDENTITY_DIM**-0.5, np.float32)
    made = {"parsing": _labels(width, height), "identity": identity, "faces": (_FACE,), "face": 0}
    return replace(record, width=width, height=height, **made)


@cache
def _labels(width: int, height: int) -> bytes:
    return encode_labels(np.zeros((height, width), np.uint8))
