"""Store: files under one output folder or fsspec URL, written whole or not at all."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import fsspec

from configs.errors import ConfigError

_TEMPORARY = ".tmp-"


class Store:
    """Names are relative, with forward slashes. On a file system a file appears by rename, on an object store when its
    upload is complete: no reader ever sees half of one."""

    def __init__(self, url: str) -> None:
        if not url:
            raise ConfigError("no output given. Say where the data set goes: output=FOLDER")
        self.url = url
        self._fs: Any
        self._fs, self.root = fsspec.url_to_fs(url)
        self.local = "file" in (self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,))

    def path(self, name: str) -> str:
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{name!r} would leave the store")
        return f"{self.root}/{name}"

    @contextmanager
    def writer(self, name: str) -> Iterator[IO[bytes]]:
        """A binary stream; the file appears under `name` when the block ends without an error."""
        if not self.local:
            with self._fs.open(self.path(name), "wb") as stream:
                yield stream
            return
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}{_TEMPORARY}{uuid4().hex[:8]}")
        try:
            with temporary.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def write(self, name: str, data: bytes | str) -> None:
        with self.writer(name) as stream:
            stream.write(data.encode() if isinstance(data, str) else data)

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """The file's bytes, or those from `start` to `end`. Raises FileNotFoundError."""
        data: bytes = self._fs.cat_file(self.path(name), start=start, end=end)
        return data

    def open(self, name: str) -> IO[bytes]:
        """Seekable, for reading. Raises FileNotFoundError."""
        return io.BytesIO(self.read(name)) if not self.local else Path(self.path(name)).open("rb")

    def exists(self, name: str) -> bool:
        return bool(self._fs.exists(self.path(name)))

    def remove(self, name: str) -> None:
        if self.exists(name):
            self._fs.rm_file(self.path(name))

    def names(self, folder: str) -> list[str]:
        """Base names in `folder`, sorted, without the traces of a killed writer; empty if it doesn't exist."""
        return [name for name in self._all(folder) if _TEMPORARY not in name]

    def sweep(self, folder: str) -> None:
        """Remove what killed writers left in `folder`. Only while no other run writes there."""
        for name in self._all(folder):
            if _TEMPORARY in name:
                self.remove(f"{folder}/{name}")

    def _all(self, folder: str) -> list[str]:
        self._fs.invalidate_cache()
        if not self._fs.exists(self.path(folder)):
            return []
        return sorted(str(path).rsplit("/", 1)[-1] for path in self._fs.ls(self.path(folder), detail=False))
