"""What a run tells while it trains, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


class Watcher(Protocol):
    """Receives the messages and the progress of a run, e.g. a progress bar."""

    def message(self, text: str) -> None:
        """Called with a line for the user."""
        ...

    def step(self, step: int, losses: dict[str, float] | None) -> None:
        """Called after every step.

        losses: means over the last `log_every` steps; None after steps that don't fetch them.
        """
        ...


@dataclass(slots=True)
class Progress:
    """The progress of a run, including the runs that it resumed.

    position: samples consumed by all processes. seconds: of training.
    """

    step: int = 0
    position: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of a run.

    signal: number of the signal that stopped it, 0 if it reached its last step. adapter: OUT/final,
    None if it was stopped. summary: the contents of summary.json, empty on other processes than
    the main one.
    """

    step: int
    signal: int
    adapter: Path | None
    summary: dict[str, Any] = field(default_factory=dict)
