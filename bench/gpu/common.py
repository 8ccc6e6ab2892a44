"""What the checks of `bench.gpu_check` share.

A check is a function that returns what it measured. It raises `MissingError` if it can't run here,
and `ToleranceError` if a value is outside its tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

Values = dict[str, Any]
DETAILS: Final = "details"  # of values, which are in the JSON file only


class MissingError(Exception):
    """What this machine lacks for a check, and how to get it."""


class ToleranceError(Exception):
    """A value outside its tolerance. values: all that were measured."""

    def __init__(self, text: str, values: Values) -> None:
        super().__init__(text)
        self.values = values


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """device: cuda, or cpu to try the checks themselves. tiny: small sizes, which take seconds on a
    CPU. folder: for data, models and outputs.
    """

    device: str
    tiny: bool
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """packages: modules that it imports. seconds: after which it is stopped."""

    run: Callable[[Setting], Values]
    packages: tuple[str, ...]
    seconds: int = 120


def need(condition: bool, text: str, values: Values) -> None:
    if not condition:
        raise ToleranceError(text, values)


def people(setting: Setting) -> Path:
    """Returns the folder of a data set of synthetic people, which is made once."""
    from bench.synthetic_person import write_people

    return write_people(setting.folder, 16 if setting.tiny else 64)


def need_weights(*names: str) -> None:
    """Raises MissingError if files of the table of weights aren't in the cache."""
    from stages.backends.weights import Weights

    if lacking := [name for name in names if not Weights().has(name)]:
        raise MissingError(f"weights {', '.join(lacking)}: `make weights` fetches them")


def need_onnx(device: str) -> None:
    """Raises MissingError if onnxruntime can't use the device."""
    from configs.errors import ConfigError
    from stages.backends.runtime import onnx_device

    try:
        onnx_device(device)
    except ConfigError as error:
        raise MissingError(str(error)) from error
