"""SampleCache: samples of remote data sets on the local disk, for several processes and runs.

A sample's bytes are a file named after their digest, in one of 256 subfolders by its first digits.
A subfolder has its share of the cache's size; whoever writes there holds its lock, and first
removes the samples that were read longest ago. So no process needs to know of the others.

    FOLDER/3f/3fa9…   a sample       FOLDER/3f/.3fa9…  one that is being written
    FOLDER/3f/.bytes  locked while a process writes; states how many bytes may be in the subfolder
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

from stages.storage.reader import SamplePlace

logger = logging.getLogger(__name__)

_SUBFOLDERS: Final = 256
_BYTES: Final = ".bytes"
_FILLED: Final = 0.9  # of a subfolder's share, after samples have been removed


class SampleCache:
    """A cache of at most `size` bytes in a folder, which other processes may use too.

    A sample that can't be written is not an error: the process and those that it forks write no
    more then, which is logged once.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._share = folder, size // _SUBFOLDERS
        self._stopped = mmap.mmap(-1, 1)  # shared with forked processes

    def read(
        self,
        places: Sequence[SamplePlace],
        fetch: Callable[[Sequence[SamplePlace]], list[bytes]],
    ) -> list[bytes]:
        """Returns the bytes of samples, in that order. `fetch` returns those that are not in the
        cache; they are added to it if they have their digests.
        """
        parts = [self._get(place.sha256) for place in places]
        missing = [i for i, part in enumerate(parts) if part is None]
        fetched = fetch([places[i] for i in missing]) if missing else []
        for i, part in zip(missing, fetched, strict=True):
            parts[i] = part
            if hashlib.sha256(part).hexdigest() == places[i].sha256:
                self._add(places[i].sha256, part)
        return [part for part in parts if part is not None]

    def _get(self, digest: str) -> bytes | None:
        """Returns the bytes with this digest; None if they aren't in the cache."""
        path = self._folder / digest[:2] / digest
        with suppress(OSError):
            part = path.read_bytes()
            if hashlib.sha256(part).hexdigest() == digest:
                with suppress(OSError):
                    os.utime(path)  # it was read last
                return part
            path.unlink()
        return None

    def _add(self, digest: str, part: bytes) -> None:
        if self._stopped[0] or len(part) > self._share:
            return
        folder = self._folder / digest[:2]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / _BYTES) as counter:
                path, temporary = folder / digest, folder / f".{digest}"
                if path.exists():
                    return
                used = _read_number(counter)
                if used is None or used + len(part) > self._share:
                    used = self._make_room(folder, self._share - len(part))
                # first, so that after a kill it isn't less than what is there
                _write_number(counter, used + len(part))
                try:
                    temporary.write_bytes(part)
                    temporary.replace(path)
                finally:
                    temporary.unlink(missing_ok=True)
        except OSError as error:
            if not self._stopped[0]:
                self._stopped[0] = 1
                logger.warning(
                    "%s can't be written (%s), so samples that it doesn't have are fetched each "
                    "time. Free disk space, correct its permissions, or set cache_folder.",
                    self._folder,
                    error.strerror or error,
                )

    def _make_room(self, folder: Path, room: int) -> int:
        """Removes the samples that were read longest ago, until those that are left have at most
        `room` bytes; returns their bytes.
        """
        samples = []
        for entry in os.scandir(folder):
            if not entry.name.startswith("."):
                with suppress(FileNotFoundError):  # a reader removes damaged ones
                    status = entry.stat()
                    samples.append((status.st_mtime_ns, status.st_size, entry.path))
            elif entry.name != _BYTES:  # of a killed writer
                Path(entry.path).unlink(missing_ok=True)
        used = sum(size for _, size, _ in samples)
        if used > room:
            room = min(room, int(_FILLED * self._share))
        for _, size, path in sorted(samples):
            if used <= room:
                break
            Path(path).unlink(missing_ok=True)
            used -= size
        return used


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file, which no other process has open by this function meanwhile."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _read_number(file: IO[bytes]) -> int | None:
    text = file.read(20)
    return int(text) if text.isdigit() else None


def _write_number(file: IO[bytes], number: int) -> None:
    file.seek(0)
    file.write(b"%020d" % number)
