"""Stopping after the current step: on SIGINT (Ctrl-C) and SIGTERM, the signal of schedulers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Final, TypeAlias

# Seconds in which further signals count as repeats of the first: launchers pass on to each process
# what a scheduler or a terminal has sent to all of them.
_PASSED_ON: Final = 2.0
_END: Final = b"\0"  # what ends the thread; no signal has this number


@dataclass(slots=True)
class Stop:
    """Whether to stop training.

    signal: number of the signal that this process received, 0 for none. agreed: some process
    received one; all processes stop after this step.
    """

    signal: int = 0
    agreed: bool = False


Stopping: TypeAlias = Callable[[], AbstractContextManager[Stop]]


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Records SIGINT or SIGTERM, so that training stops after the current step. A second signal,
    more than two seconds later, ends the process at once with status 128 + its number, whatever the
    process waits for. The previous handlers are restored at exit.
    """
    stop = Stop()
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number: int, _frame: FrameType | None) -> None:
        stop.signal = stop.signal or number

    # Python runs a handler when an operation of a library has ended. Numbers of signals are written
    # to this descriptor at once, and the thread reads them.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    thread = threading.Thread(target=_end_at_second, args=(reading, {*previous}), daemon=True)
    thread.start()
    descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in previous:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor)
        os.write(writing, _END)
        thread.join()
        os.close(writing)
        os.close(reading)


def _end_at_second(descriptor: int, numbers: set[int]) -> None:
    """Ends the process at the second of these signals whose number is read from the descriptor."""
    first = 0.0
    while (data := os.read(descriptor, 1)) != _END:
        if data[0] in numbers:
            first = first or time.monotonic()
            if time.monotonic() - first > _PASSED_ON:
                os._exit(128 + data[0])
