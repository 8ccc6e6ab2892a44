"""Memory of a process."""

from __future__ import annotations

from pathlib import Path


def peak(pid: int | str = "self") -> float:
    """Returns the peak resident MB of a process, 0.0 if it has ended.

    It is read from /proc, because getrusage also counts what its parent used before the fork.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0.0
    return round(
        next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0) / 1024, 1
    )
