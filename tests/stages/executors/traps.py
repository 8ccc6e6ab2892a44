"""Chains with a stage in which records kill the process, hang or raise, by their names."""

from __future__ import annotations

import ctypes
import time

from bench.chains import SleepConfig, SleepStage, resizing
from configs.errors import ServerError
from configs.schema import DatasetConfig
from stages.base import Stage
from stages.record import Record


class Trap(SleepStage):
    """killer*: the process dies of a segmentation fault. sleeper*: takes an hour. serverless*:
    raises ServerError.
    """

    name = "trap"
    provides = ("caption", "face_caption")

    def process(self, records: list[Record]) -> list[Record]:
        for record in records:
            if record.source.startswith("killer"):
                ctypes.string_at(0)
            if record.source.startswith("sleeper"):
                time.sleep(3600)
            if record.source.startswith("serverless"):
                raise ServerError("no server")
        return records


def trap_alone(text: str) -> list[Stage]:
    """Returns the trap, for a ChainReference. The text is not used."""
    return [Trap(SleepConfig(0.0))]


def trapped(config: DatasetConfig) -> list[Stage]:
    """Returns resize, the trap, and a stage that sets the other fields to constants."""
    resize, fill = resizing(config)
    return [resize, Trap(SleepConfig(0.0, config.resize.placement)), fill]
