"""The base model of a run: a trained one by name, or the tiny one, made here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from configs.training import TrainConfig
from model.spec import ModelSpec


def ensure_base(config: TrainConfig, spec: ModelSpec, message: Callable[[str], None]) -> str:
    """Returns the folder or hub id of the base model.

    If neither the configuration nor the spec names one, the tiny base is made in OUT/base, unless
    it is there already; only one process may call this then. message: receives a line for the
    user. Raises WeightsError if the tiny base's vocabulary can't be fetched, and ConfigError if
    OUT/base holds anything else.
    """
    base = config.model.base or spec.base
    if base:
        return base
    from model.tiny import make_tiny_base
    from stages.backends.weights import Weights

    folder = Path(config.output) / "base"
    if not folder.exists():
        message(
            f"model {spec.name!r}: making a tiny base with random weights in {folder}. It is for "
            "tests: portraits are noise. model.spec=small is a base that was trained."
        )
    return str(make_tiny_base(folder, Weights(config.weights).fetch("clip_bpe"), config.seed))
