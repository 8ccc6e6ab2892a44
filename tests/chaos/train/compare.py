"""Compares a run with an undisturbed one: samples, losses, weights, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from train.checkpoints import checkpoints, damage
from train.history import HISTORY, KEYS, read_lines
from train.state import STATE_FILE
from train.step import LOSSES

# Where the number of processes or the micro-batch changes, sums are rounded otherwise. Measured in
# 20 steps on 1, 2 and 4 processes: losses differ by 1e-6 of their value, weights by 1.5e-8 (root of
# the mean square). A single step moves the weights by 3e-4, so one that is lost, repeated, or made
# of other samples is far outside.
LOSS_TOLERANCE = 1e-4
WEIGHT_TOLERANCE = 1e-6


def differences(output: Path, undisturbed: Path, steps: int, *, same: bool) -> list[str]:
    """Returns how a finished run differs from the undisturbed one. same: the runs had the same
    processes and micro-batches all the time, so that every bit must be equal.
    """
    faults = []
    ours, theirs = ([*read_lines(folder / KEYS)] for folder in (output, undisturbed))
    if ours != theirs:
        pairs = enumerate(zip(ours, theirs, strict=False), 1)
        first = next((step for step, (one, other) in pairs if one != other), len(ours) + 1)
        faults.append(f"{KEYS}: other samples from step {first} on")
    ours, theirs = ([*read_lines(folder / HISTORY)] for folder in (output, undisturbed))
    numbers = [line["step"] for line in ours]
    if numbers != list(range(1, steps + 1)):
        faults.append(f"{HISTORY} has the steps {numbers}")
    elif any(line[name] is None for line in ours for name in LOSSES):
        faults.append(f"{HISTORY} has losses that are not finite")
    elif same and ours != theirs:
        faults.append(f"{HISTORY} differs: {_first(ours, theirs)}")
    elif not same and (error := _loss_error(ours, theirs)) > LOSS_TOLERANCE:
        faults.append(f"{HISTORY} differs by {error:.1e}, more than {LOSS_TOLERANCE:g}")
    weights, expected = weights_of(output / "final"), weights_of(undisturbed / "final")
    if weights.keys() != expected.keys():
        return [*faults, "final has other weights"]
    unequal = [name for name, value in weights.items() if not torch.equal(value, expected[name])]
    if same and unequal:
        faults.append(
            f"{len(unequal)} of {len(weights)} tensors in final differ in a bit or more; distance "
            f"{distance(weights, expected):.1e}"
        )
    elif not same and (error := distance(weights, expected)) > WEIGHT_TOLERANCE:
        faults.append(f"final differs by {error:.1e}, more than {WEIGHT_TOLERANCE:g}")
    faults += [f"{path.name} is left" for path in output.glob(".*")]
    return faults


def _first(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    return next(f"{a} instead of {b}" for a, b in zip(ours, theirs, strict=True) if a != b)


def _loss_error(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float:
    """Returns the largest difference of a loss, relative to the loss (to 0.01 if it is smaller)."""
    return max(
        abs(one[name] - other[name]) / max(abs(other[name]), 1e-2)
        for one, other in zip(ours, theirs, strict=True)
        for name in LOSSES
    )


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the weights of an adapter's folder; none if there is no such folder."""
    return {
        f"{path.name}:{name}": value
        for path in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def distance(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Returns the root of the mean squared difference of two sets of weights."""
    squares = sum(
        float((value.double() - others[name].double()).square().sum())
        for name, value in weights.items()
    )
    count = sum(value.numel() for value in weights.values())
    return float((squares / count) ** 0.5)


def not_finite(output: Path) -> list[str]:
    """Returns the intact checkpoints that have a value that isn't finite."""
    faults = []
    for folder in checkpoints(output):
        if damage(folder):
            continue
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        tensors = [*weights_of(folder).items(), *_tensors(state)]
        names = [name for name, value in tensors if not bool(torch.isfinite(value).all())]
        if names:
            faults.append(f"{folder.name} has values that are not finite, in {names[0]}")
    return faults


def _tensors(value: Any, name: str = STATE_FILE) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _tensors(each, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _tensors(each, f"{name}.{index}")
