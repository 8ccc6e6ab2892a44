"""What a run tells while it is measured."""

from __future__ import annotations

import sys


class Watcher:
    """Prints messages to standard error if `prints`, and keeps the losses. It is a watcher of
    trainings (train.outcome) and of features (train.features.make).
    """

    def __init__(self, *, prints: bool = False) -> None:
        self._prints = prints
        self.losses: list[float] = []

    def message(self, text: str) -> None:
        if self._prints:
            print(text, file=sys.stderr)

    def start(self, name: str, step: int, total: int, batch_size: int, unit: str) -> None: ...

    def step(self, step: int, losses: dict[str, float] | None) -> None:
        if losses is not None and "loss" in losses:
            self.losses.append(losses["loss"])
