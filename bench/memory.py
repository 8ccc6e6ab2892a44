"""Memory of a process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_INTERVAL: Final = 0.05  # seconds


def peak(pid: int | str = "self") -> float:
    """Returns the peak resident MB of a process, 0.0 if it has ended.

    It is read from /proc, because getrusage also counts what its parent used before the fork.
    """
    return _field(pid, "VmHWM")


@contextmanager
def own_peak() -> Iterator[list[float]]:
    """Yields a list that gets, at the end, the peak MB of this process without mapped files.

    Pages of mapped files can be dropped and read again, so they need not fit. The kernel keeps no
    such peak, so the size is read 20 times a second.
    """
    stop, peaks = threading.Event(), [0.0]

    def watch() -> None:
        while not stop.wait(_INTERVAL):
            peaks[0] = max(peaks[0], _field("self", "RssAnon"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        stop.set()
        thread.join()


def _field(pid: int | str, name: str) -> float:
    """Returns a number of /proc/PID/status in MB, 0.0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0.0
    sizes = (int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
    return round(next(sizes, 0) / 1024, 1)
