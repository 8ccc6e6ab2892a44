"""Base models that a process reads once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from model.consistentid import BaseModels, load_base
from model.spec import ModelSpec


@contextmanager
def read_once(module: ModuleType) -> Iterator[None]:
    """Lets a module that loads bases get copies of models that were read once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_base", base_copy)
        yield


def base_copy(spec: ModelSpec, base: str | Path, **options: Any) -> BaseModels:
    """What `load_base` returns, with copies of models that were read once: no caller sees another's
    changes. Tests never change a base's files.
    """
    models = _base(spec, Path(base).resolve(), **options)
    return replace(models, **{name: copy.deepcopy(part) for name, part in models.modules.items()})


@cache
def _base(spec: ModelSpec, base: Path, **options: Any) -> BaseModels:
    return load_base(spec, base, **options)
