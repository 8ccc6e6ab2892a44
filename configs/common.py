"""What every part of the configuration is made of: checks, placement, and which settings a
signature hashes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Final

from configs.errors import ConfigError

NO_ANSWER: Final = {"answers": False}
"""Metadata of a field that changes no answer of its stage, such as where it runs: it stays out of
the signature.
"""


def introduced(value: Any) -> dict[str, Any]:
    """Metadata of a field that was added later, with the value it was introduced with: the one
    under which answers are what they were without the field.

    While the setting has that value, it stays out of the signature, so that existing data sets keep
    theirs.
    """
    return {"since": value}


def hashed_settings(config: Any) -> dict[str, Any]:
    """The settings of a configuration class that its signature hashes, sections inside it included:
    those that are not NO_ANSWER and differ from the value they were introduced with.
    """
    settings = {}
    for field in fields(config):
        value, metadata = getattr(config, field.name), field.metadata
        unchanged = "since" in metadata and value == metadata["since"]
        if metadata.get("answers", True) and not unchanged:
            settings[field.name] = hashed_settings(value) if is_dataclass(value) else value
    return settings


def subsection(values: dict[str, Any], name: str, key: str) -> dict[str, Any]:
    """The mapping `values[name]`, created where it is missing. Raises ConfigError, which names
    `key`, where it is a value.
    """
    section = values.setdefault(name, {})
    check(isinstance(section, dict), f"{key}: {name} is a value, not a section")
    found: dict[str, Any] = section
    return found


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
