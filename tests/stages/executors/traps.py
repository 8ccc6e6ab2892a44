"""Chains with a stage that records can kill, or hold up for ever, by their names."""

from __future__ import annotations

import ctypes
import time

from bench.chains import SleepConfig, SleepStage, resizing
from configs.errors import ServerError
from configs.schema import DatasetConfig
from stages.base import Stage
from stages.record import Record


class Trap(SleepStage):
    """killer*: the process dies of a segmentation fault. sleeper*: never ends. lonely*: raises
    ServerError.
    """

    name = "trap"
    provides = ("caption", "face_caption")

    def process(self, records: list[Record]) -> list[Record]:
        for record in records:
            if record.source.startswith("killer"):
                ctypes.string_at(0)
            if record.source.startswith("sleeper"):
                time.sleep(3600)
            if record.source.startswith("lonely"):
                raise ServerError("nobody answers")
        return records


def trap_alone(text: str) -> list[Stage]:
    """For a ChainReference; the text is not used."""
    return [Trap(SleepConfig(0.0))]


def trapped(config: DatasetConfig) -> list[Stage]:
    """A Chain: resize, the trap, and constants for the rest."""
    resize, fill = resizing(config)
    return [resize, Trap(SleepConfig(0.0, config.resize.placement)), fill]
