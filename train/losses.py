"""The losses of steps: kept on the device, fetched together, and divided into their samples.

Training and replay add up the samples' losses in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from train.step import LOSSES, StepLosses

_COLUMNS = len(LOSSES) + 1  # of a sample: its losses and its timestep


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedLosses:
    """Of n steps of B samples. values: (n, 3), the LOSSES of each step. errors: (n, B, 3), those of
    each sample, in the order of their positions, 0 for one that was left out. timesteps: (n, B).
    """

    values: npt.NDArray[np.float32]
    errors: npt.NDArray[np.float32]
    timesteps: npt.NDArray[np.int64]


def losses_of_process(losses: Sequence[StepLosses]) -> Tensor:
    """Returns a process's part of a step's losses as one vector on the device.

    losses: of its micro-batches, in order. The vector has their sums, and for each sample its
    losses and timestep.
    """
    sums = torch.stack([each.values for each in losses]).sum(0)
    samples = [torch.cat((each.errors, each.timesteps[:, None].float()), 1) for each in losses]
    return torch.cat((sums, torch.cat(samples).flatten()))


def joined(parts: Tensor, accumulation: int) -> FetchedLosses:
    """Joins the parts of all processes.

    parts: (processes, n, length), for each process and step what `losses_of_process` returned.
    accumulation: micro-batches of a process in a step.
    """
    parts = parts.cpu()
    values = parts[0, :, : len(LOSSES)]
    for part in parts[1:, :, : len(LOSSES)]:  # in this order on any number of processes
        values = values + part
    world, steps = parts.shape[:2]
    # micro-batch m of a step went to process m mod W
    samples = parts[:, :, len(LOSSES) :].reshape(world, steps, accumulation, -1, _COLUMNS)
    samples = samples.permute(1, 2, 0, 3, 4).reshape(steps, -1, _COLUMNS)
    return FetchedLosses(
        values=values.numpy(),
        errors=samples[..., :-1].numpy(),
        timesteps=samples[..., -1].numpy().astype(np.int64),
    )


class LossWindow:
    """The losses of the last steps, on the device, with the learning rates of these steps.

    accumulation: micro-batches of a process in a step. gather: (1, …) of each process → those of
    all processes.
    """

    def __init__(self, accumulation: int, gather: Callable[[Tensor], Tensor]) -> None:
        self._accumulation, self._gather = accumulation, gather
        self._parts: list[Tensor] = []
        self._rates: list[Mapping[str, float]] = []

    def add(self, part: Tensor, rates: Mapping[str, float]) -> None:
        """Adds a step. part: what `losses_of_process` returned. rates: the learning rates."""
        self._parts.append(part)
        self._rates.append(rates)

    def fetch(self) -> tuple[FetchedLosses, list[Mapping[str, float]]]:
        """Returns the losses and learning rates of the steps that were added, and removes them. All
        processes must call it together.
        """
        parts, rates = self._gather(torch.stack(self._parts)[None]), self._rates
        self._parts, self._rates = [], []
        return joined(parts, self._accumulation), rates
