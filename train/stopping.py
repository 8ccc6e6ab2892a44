"""Stopping after the current step: on SIGINT (Ctrl-C) and SIGTERM, the signal of schedulers."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


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

    After the first signal, a second one ends the process at once, without waiting for the thread
    that writes a checkpoint. The previous handlers are restored at exit.
    """
    stop = Stop()
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def on_signal(number: int, _frame: FrameType | None) -> None:
        stop.signal = number
        for each in previous:
            signal.signal(each, signal.SIG_DFL)

    for number in previous:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        restore()
