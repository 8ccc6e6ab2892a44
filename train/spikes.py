"""Loss spikes: samples whose noise loss is far above what is normal at their timestep.

The noise loss depends on the timestep more than on the sample: over the timesteps it varies by a
factor of 100. So the last samples are sorted by timestep into groups of equal number, and a loss is
compared with the medians of the groups beside it, in units of the median absolute deviation, both
of its logarithm. Neither is changed much by spikes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from train.history import Lines, exact
from train.losses import FetchedLosses
from train.step import LOSSES

SPIKES: Final = "spikes.jsonl"
_WINDOW: Final = 1_024  # samples whose losses are compared with
_GROUP: Final = 64  # of these
_FIRST: Final = 512  # samples before anything is compared
_RENEWED: Final = 128  # samples after which the groups are formed again
_LIMIT: Final = 4.5  # deviations above the median, of the logarithm
_DEVIATION: Final = 1.4826  # standard deviation of a normal distribution, in its MADs
_LEAST: Final = 0.15  # smallest deviation of the logarithm
_LISTED: Final = 32  # samples in a line of the file
_NAMED: Final = 3  # samples in a message

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpikeContext:
    """output: the run's folder. name: of the output, for the user. batch: samples of a step.
    names_at: position → the sample's key and shard. masked: step → whether its loss leaves out the
    background. message: for the user.
    """

    output: Path
    name: str
    batch: int
    names_at: Callable[[int], tuple[str, str]]
    masked: Callable[[int], bool]
    message: Callable[[str], None]


class SpikeCheck:
    """Lists spikes in OUT/spikes.jsonl. What it lists doesn't depend on how many steps are fetched
    together, nor on resumes.

    step: that the run resumes from. state: what `state` returned then; None for a new run.
    """

    def __init__(
        self, context: SpikeContext, step: int, state: dict[str, Any] | None = None
    ) -> None:
        self._context = context
        self._lines = Lines(context.output / SPIKES, step=step)
        # with and without the background, which changes the loss
        self._normal = {name: _Normal() for name in ("masked", "whole")}
        for name, values in (state or {}).items():
            self._normal[name].restore(values)

    def state(self) -> dict[str, Any]:
        """Returns what the next checks depend on, as tensors and plain values."""
        return {name: normal.state() for name, normal in self._normal.items()}

    def add(self, step: int, position: int, fetched: FetchedLosses) -> None:
        """Checks steps in order. step, position: of the first one and of its first sample."""
        lines = []
        for index in range(len(fetched.values)):
            line = self._check(step + index, position + index * self._context.batch, fetched, index)
            if line is not None:
                lines.append(line)
        if lines:
            self._lines.add(lines)
            self._announce(max(lines, key=lambda line: line["samples"][0]["times"]), len(lines))

    def _check(
        self, step: int, position: int, fetched: FetchedLosses, index: int
    ) -> dict[str, Any] | None:
        """Returns the step's line for the file; None if it has no spike."""
        errors, timesteps = fetched.errors[index], fetched.timesteps[index]
        noise = errors[:, LOSSES.index("noise_loss")].astype(np.float64)
        # a sample that was left out has the loss 0
        rows = np.flatnonzero(np.isfinite(noise) & (noise > 0))
        logs, timesteps = np.log(noise[rows]), timesteps[rows]
        normal = self._normal["masked" if self._context.masked(step) else "whole"]
        medians, limits = normal.at(timesteps)
        normal.add(timesteps, logs)
        if not (logs > limits).any():
            return None
        expected = np.exp(medians)
        samples = []
        for i in np.argsort(medians - logs, kind="stable")[:_LISTED]:
            key, shard = self._context.names_at(position + int(rows[i]))
            values = {n: exact(v) for n, v in zip(LOSSES, errors[rows[i]], strict=True)}
            samples.append(
                {
                    "key": key,
                    "shard": shard,
                    "timestep": int(timesteps[i]),
                    **values,
                    "expected": float(f"{expected[i]:.6g}"),
                    "times": round(float(noise[rows[i]] / expected[i]), 2),
                }
            )
        return {
            "step": step,
            **{n: exact(v) for n, v in zip(LOSSES, fetched.values[index], strict=True)},
            "expected": float(f"{expected.mean():.6g}"),
            "samples": samples,
        }

    def _announce(self, line: dict[str, Any], count: int) -> None:
        names = ", ".join(
            f"{sample['key']} ({sample['times']:g} times)" for sample in line["samples"][:_NAMED]
        )
        more = f" {count - 1} more of these steps are in {SPIKES}." if count > 1 else ""
        self._context.message(
            f"step {line['step']:,}: a noise loss is far above the median at its timestep. The "
            f"step's samples with the highest: {names}. To see the step: make replay "
            f"OUT={self._context.name} STEP={line['step']}.{more}"
        )


class _Normal:
    """The normal noise losses at each timestep, of the last samples that were added."""

    def __init__(self) -> None:
        self._window: Floats = np.empty((0, 2))  # timestep, logarithm of the loss
        self._groups: Floats = np.empty((0, 3))  # timestep, median, deviation
        self._new = 0  # samples since the groups were formed

    def state(self) -> dict[str, Any]:
        return {
            "window": torch.tensor(self._window),
            "groups": torch.tensor(self._groups),
            "new": self._new,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._window, self._groups = state["window"].numpy(), state["groups"].numpy()
        self._new = state["new"]

    def at(self, timesteps: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Returns the medians of the logarithm, (n,), and the limits above which it is a spike;
        these are infinite until there are enough samples.
        """
        if not len(self._groups):
            return np.zeros(len(timesteps)), np.full(len(timesteps), np.inf)
        centres, medians, deviations = self._groups.T
        expected = np.interp(timesteps, centres, medians)
        return expected, expected + _LIMIT * np.interp(timesteps, centres, deviations)

    def add(self, timesteps: npt.NDArray[np.int64], logs: Floats) -> None:
        rows = np.stack((timesteps.astype(np.float64), logs), axis=1)
        self._window = np.concatenate((self._window, rows))[-_WINDOW:]
        self._new += len(logs)
        if self._new >= _RENEWED and len(self._window) >= _FIRST:
            self._groups, self._new = _groups(self._window), 0


def _groups(window: Floats) -> Floats:
    """Returns the median timestep, the median and the deviation of each group, (groups, 3). Between
    the medians, normal losses are interpolated.
    """
    window = window[np.argsort(window[:, 0], kind="stable")]
    groups = np.array_split(window, len(window) // _GROUP)
    centres, medians = np.array([np.median(group, axis=0) for group in groups]).T
    rests = [np.abs(group[:, 1] - np.interp(group[:, 0], centres, medians)) for group in groups]
    # of the groups beside it too: of 64 losses alone, it is uncertain by a fifth
    beside = [np.concatenate(rests[max(0, i - 1) : i + 2]) for i in range(len(rests))]
    deviations = [max(_LEAST, _DEVIATION * float(np.median(rest))) for rest in beside]
    return np.stack((centres, medians, deviations), axis=1)
