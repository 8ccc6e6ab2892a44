"""An output on a disk that is too small at first."""

from __future__ import annotations

import os
import random
import resource
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.command import output_of

_SHARES = (0.05, 0.9)  # of the data set's size, for the runs that find the disk full
_ROOM = 20  # times the data set's size, for the last run


@dataclass
class SmallDisk:
    """A context manager that makes `folder` a file system in memory, whose size can be changed.

    Only root can mount one. For others, `limit` gives processes a limit for each file instead,
    which has the same effect on a run without Ray. largest: bytes of the data set's largest file.
    """

    folder: Path
    largest: int

    def __enter__(self) -> SmallDisk:
        self.folder.mkdir()
        self.is_mounted = os.geteuid() == 0 and self._mount("size=4k")
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    def resize(self, size: int) -> None:
        """Gives the file system room for `size` bytes."""
        if self.is_mounted and not self._mount(f"remount,size={size}"):
            raise RuntimeError(f"{self.folder} can't be resized to {size} bytes")

    def limit(self, share: float) -> Callable[[], None] | None:
        """Returns a preexec_fn that allows files of a share of the largest one; None if the folder
        is a file system of its own.
        """
        bytes_ = int(share * self.largest)
        if self.is_mounted:
            return None
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))

    def _mount(self, options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        return subprocess.run(command, capture_output=True).returncode == 0


def fill(arguments: list[str], disk: SmallDisk, size: int, rng: random.Random) -> list[str]:
    """Runs the command three times: twice on a full disk, and with enough room. Returns faults.

    arguments: of the command line, with an output on the disk. size: bytes of the whole data set.
    """
    faults = []
    for _ in range(2):
        share = rng.uniform(*_SHARES)
        disk.resize(int(share * size))
        code, text = output_of(arguments, disk.limit(share))
        if code != 2 or "Traceback" in text or "can't be written" not in text:
            faults.append(f"on a disk with {share:.0%} of the room, exit {code}: {text[-600:]}")
    disk.resize(_ROOM * size)
    code, text = output_of(arguments, disk.limit(_ROOM))
    return [*faults, *([] if code == 0 else [f"with enough room, exit {code}: {text[-600:]}"])]
