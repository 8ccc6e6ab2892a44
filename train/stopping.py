"""Stopping after the current step: on SIGINT (Ctrl-C) and SIGTERM, the signal of schedulers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Final

_TWICE: Final = 2.0  # seconds in which a signal that was sent once may arrive again


@dataclass(slots=True)
class Stop:
    """Whether to stop training.

    signal: number of the signal that this process received, 0 for none. agreed: number of a signal
    that some process received; all processes stop after this step.
    """

    signal: int = 0
    agreed: int = 0


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Records SIGINT or SIGTERM, so that training stops after the current step.

    A further signal ends the process at once. For two seconds after the first one, further signals
    have no effect: a signal to all processes arrives a second time from torch's launcher, which
    passes its own on. The previous handlers are restored at exit.
    """
    stop, first = Stop(), 0.0
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        if not stop.signal:
            stop.signal, first = number, time.monotonic()
        elif time.monotonic() - first > _TWICE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in previous:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
