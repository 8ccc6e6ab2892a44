"""What passes between the main worker of a run on Ray and its driver: messages and progress to the
driver, a signal to the worker.
"""

from __future__ import annotations

from typing import NamedTuple


class News(NamedTuple):
    """What happened since the last call. messages: lines for the user. step: the last one, 0 for
    none. losses: the last ones that were fetched; None for none.
    """

    messages: tuple[str, ...] = ()
    step: int = 0
    losses: dict[str, float] | None = None


class Relay:
    """An actor on the driver's node, which outlasts workers: both sides call it twice a second."""

    def __init__(self) -> None:
        self._messages: list[str] = []
        self._step = 0
        self._losses: dict[str, float] | None = None
        self._called = False
        self._signal = 0

    def tell(self, news: News) -> int:
        """Takes news for the driver. Returns the number of the signal that it received, or 0."""
        self._called = True
        self._messages += news.messages
        self._step = news.step or self._step
        self._losses = news.losses or self._losses
        return self._signal

    def exchange(self, signal: int) -> News | None:
        """Takes the number of a signal, 0 for none. Returns the news since the last call; None if
        no worker has called `tell` since then.
        """
        self._signal = signal or self._signal
        news = News(tuple(self._messages), self._step, self._losses) if self._called else None
        self._messages, self._step, self._losses, self._called = [], 0, None, False
        return news
