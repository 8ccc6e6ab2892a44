"""How long the parts of steps take on the device, measured without waiting for it."""

from __future__ import annotations

import time
from collections import defaultdict
from itertools import pairwise
from typing import Any, Final

import torch

PARTS: Final = ("encode", "forward", "backward", "optimizer")


class StepClock:
    """Adds up the seconds of each part of steps.

    encode: outputs of the frozen encoders, and noise. forward: of the trained parts and the UNet,
    with the losses. backward: gradients. optimizer: the change of the weights. On a GPU, the marks
    are events in its queue. On devices without such events nothing is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._measures = device.type in ("cpu", "cuda")
        self._marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        """Ends a part of a step, which began at the mark before. "" begins a step."""
        if not self._measures:
            return
        now: Any = time.perf_counter()
        if self._on_gpu:
            now = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            now.record()
        self._marks.append((part, now))

    def fetch(self) -> dict[str, float]:
        """Returns the seconds of each part since the last call. On a GPU it waits for the last
        mark, so call it when the host has waited for the steps.
        """
        seconds: dict[str, float] = defaultdict(float)
        marks, self._marks = self._marks, []
        if self._on_gpu and marks:
            marks[-1][1].synchronize()
        for (_, before), (part, now) in pairwise(marks):
            if part:
                seconds[part] += before.elapsed_time(now) / 1e3 if self._on_gpu else now - before
        return dict(seconds)
