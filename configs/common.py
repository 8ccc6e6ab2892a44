"""What every part of the configuration is made of: checks, placement, and which fields change no
answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from configs.errors import ConfigError

NO_ANSWER: Final = {"answers": False}
"""Metadata of a field that changes no answer of its stage, such as where it runs: it stays out of
the signature.
"""


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementConfig:
    """Where copies of a stage run: of what a Ray node has, and how many pictures at a time. Changes
    no answer.

    Neighbouring stages with equal cpus and gpus share one process, and pass records without copying
    them.
    """

    cpus: float = 0.75
    gpus: float = 0.0
    batch_size: int = 1  # no gain from batching on a CPU; presets for GPUs raise it

    def __post_init__(self) -> None:
        check(
            self.cpus > 0 and self.gpus >= 0,
            f"cpus={self.cpus}, gpus={self.gpus}: expected over 0, at least 0",
        )
        check(self.batch_size >= 1, f"batch_size={self.batch_size}: expected at least 1")
