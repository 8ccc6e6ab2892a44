"""Parts that several configuration modules use: checks, placement, weights, and which settings a
signature hashes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Final, Literal

from configs.errors import ConfigError

# Metadata of a setting that doesn't change the results of its stage, such as its placement: the
# stage's signature doesn't hash it.
NOT_HASHED: Final = {"hashed": False}


def introduced(value: Any) -> dict[str, Any]:
    """Returns metadata for a setting that was added to an existing stage.

    value: the setting's value under which results are the same as without the setting. The
    signature doesn't hash the setting while it has this value, so that existing data sets keep
    their signatures.
    """
    return {"since": value}


def introduced_as(name: str) -> dict[str, Any]:
    """Returns metadata for a setting that was split off the setting `name` of the same class:
    results are the same as before while both have one value. The rest is as in `introduced`.
    """
    return {"since_setting": name}


# Metadata of a setting whose value may be given in the place of its section: `data: OUT` for
# `data: {path: OUT}`.
ALONE: Final = {"alone": True}


def alone(kind: Any) -> str:
    """Returns the name of a configuration dataclass's setting with the metadata ALONE; "" if it has
    none.
    """
    return next((field.name for field in fields(kind) if field.metadata.get("alone")), "")


def hashed_settings(config: Any) -> dict[str, Any]:
    """Returns the settings that the signature hashes, by name, of a configuration dataclass and of
    the dataclasses in it: those that are not NOT_HASHED and differ from the value they were
    introduced with.
    """
    settings = {}
    for field in fields(config):
        value, metadata = getattr(config, field.name), field.metadata
        unchanged = ("since" in metadata and value == metadata["since"]) or (
            "since_setting" in metadata and value == getattr(config, metadata["since_setting"])
        )
        if metadata.get("hashed", True) and not unchanged:
            settings[field.name] = hashed_settings(value) if is_dataclass(value) else value
    return settings


def subsection(values: dict[str, Any], name: str, key: str) -> dict[str, Any]:
    """Returns the mapping `values[name]`; creates it if it is missing. Raises ConfigError, whose
    message names `key`, if `values[name]` is not a mapping.
    """
    section = values.setdefault(name, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{key}: {name} is a value, not a section")
    return section


def check(condition: bool, message: str) -> None:
    """Raises ConfigError with this message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementConfig:
    """What one copy of a stage uses. It doesn't change results.

    Consecutive stages with equal cpus and gpus run in one process and pass records without copying.
    """

    cpus: float = 0.75  # CPU cores of a Ray node
    gpus: float = 0.0  # GPUs of a Ray node
    batch_size: int = 1  # images; batches gain nothing on a CPU, presets for GPUs raise it

    def __post_init__(self) -> None:
        check(
            self.cpus > 0 and self.gpus >= 0,
            f"cpus={self.cpus}, gpus={self.gpus}: expected cpus over 0 and gpus at least 0",
        )
        check(self.batch_size >= 1, f"batch_size={self.batch_size}: expected at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsConfig:
    """Where weights files come from, and which licenses are allowed."""

    paths: tuple[str, ...] = ()  # NAME=FILE: use this file for that name in the weights table
    cache: str = ""  # "": $CONSISTENTID_CACHE, else ~/.cache/consistentid
    # commercial: refuse weights whose license doesn't allow commercial use
    allow: Literal["any", "commercial"] = "any"
