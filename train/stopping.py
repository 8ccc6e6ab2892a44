"""Stopping after the current step: on SIGINT (Ctrl-C) and SIGTERM, the signal of schedulers."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Final, TypeAlias

# Seconds in which a further signal is the first one again: launchers pass on to each process what
# a scheduler or a terminal has sent to all of them.
_PASSED_ON: Final = 2.0


@dataclass(slots=True)
class Stop:
    """Whether to stop training.

    signal: number of the signal that this process received, 0 for none. agreed: number of a signal
    that some process received; all processes stop after this step.
    """

    signal: int = 0
    agreed: int = 0


Stopping: TypeAlias = Callable[[], AbstractContextManager[Stop]]


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Records SIGINT or SIGTERM, so that training stops after the current step. A second signal,
    more than two seconds later, ends the process at once, without waiting for the thread
    that writes a checkpoint. The previous handlers are restored at exit.
    """
    stop, first = Stop(), 0.0
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        if not stop.signal:
            stop.signal, first = number, time.monotonic()
        elif time.monotonic() - first > _PASSED_ON:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in previous:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
