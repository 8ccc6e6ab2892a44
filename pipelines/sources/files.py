"""Pictures as files: a folder, a glob, or an fsspec URL of either (s3://, gs://, hf://, https://, …).

A name that ends like a picture but is no regular file (a folder, a dangling link, a pipe) is listed with size -1 and
never opened blindly.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from typing import Any

import fsspec

from configs.errors import SourceError
from configs.schema import DatasetConfig
from pipelines.sources.base import Input, Source
from pipelines.sources.paths import read_range, version_of
from stages.base import Failed

_MAGIC = re.compile(r"[*?\[]")


class LocalFiles(Source):
    """Files under a folder of this machine (or of a file system that every node mounts), or those a glob names."""

    def list(self) -> Iterator[Input]:
        config = self.config
        root, pattern = split_glob(config.path)
        if not os.path.isdir(root):
            raise SourceError(
                f"source.path={config.path!r} is not a folder. Give a folder of {', '.join(config.extensions)}, "
                "a glob, or an fsspec URL."
            )
        skip = os.fsencode(os.path.realpath(self.output)) if self.output else b""
        top = os.fsencode(root)
        for folder, folders, files in os.walk(top):
            folders[:] = [name for name in folders if os.path.realpath(os.path.join(folder, name)) != skip]
            for name in (*files, *folders):
                if os.path.splitext(os.fsdecode(name))[1].lower() in config.extensions:
                    item = self._input(top, os.path.relpath(os.path.join(folder, name), top))
                    if pattern is None or pattern.fullmatch(item.source):
                        yield item

    def _input(self, top: bytes, path: bytes) -> Input:
        source = path.decode("utf-8", "backslashreplace").replace(os.sep, "/")
        try:
            found = os.stat(os.path.join(top, path))
        except OSError:
            return Input(source=source, locator=path)
        if not stat.S_ISREG(found.st_mode):
            return Input(source=source, locator=path)
        return Input(source=source, locator=path, size=found.st_size, version=str(found.st_mtime_ns))

    def read(self, item: Input, count: int = -1) -> bytes:
        """Raises Failed: not_a_file, unreadable, too_many_bytes."""
        root, _ = split_glob(self.config.path)
        return read_file(os.path.join(os.fsencode(root), item.locator), self.limit, count)


class RemoteFiles(Source):
    """Files behind an fsspec URL. What answers for a moment only is tried again."""

    concurrency = 16

    def __init__(self, config: DatasetConfig) -> None:
        super().__init__(config)
        root, self._pattern = split_glob(self.config.path)
        self._fs: Any
        self._fs, self._root = fsspec.url_to_fs(root)

    def list(self) -> Iterator[Input]:
        for folder, _, files in self._fs.walk(self._root, detail=True):
            for name, found in sorted(files.items()):
                path = f"{folder.rstrip('/')}/{name}"
                source = path[len(self._root) :].lstrip("/")
                if os.path.splitext(name)[1].lower() not in self.config.extensions:
                    continue
                if self._pattern is None or self._pattern.fullmatch(source):
                    size = found.get("size")
                    yield Input(
                        source=source,
                        locator=path.encode(),
                        size=-1 if size is None else int(size),
                        version=version_of(found),
                    )

    def read(self, item: Input, count: int = -1) -> bytes:
        """Raises Failed: not_a_file, unreadable, too_many_bytes; Transient: unreachable."""
        if item.size > self.limit:
            raise Failed("too_many_bytes", f"{item.size:,} bytes, limit {self.limit:,}")
        end = self.limit + 1 if count < 0 else count
        data = read_range(self._fs, item.locator.decode(), 0, end)
        if len(data) > self.limit:
            raise Failed("too_many_bytes", f"over {self.limit:,} bytes")
        return data


def split_glob(path: str) -> tuple[str, re.Pattern[str] | None]:
    """The folder above the first wildcard, and a pattern for names relative to it; no pattern for a plain folder."""
    if not _MAGIC.search(path) or os.path.isdir(path):
        return path.rstrip("/") or path, None
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    from fsspec.utils import glob_translate

    return "/".join(parts[:first]) or ("/" if path.startswith("/") else "."), re.compile(
        glob_translate("/".join(parts[first:]))
    )


def read_file(path: bytes, limit: int, count: int = -1) -> bytes:
    """A regular file's bytes, or the first `count`. Raises Failed: not_a_file, unreadable, too_many_bytes (`limit`)."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:  # O_NONBLOCK: a pipe can't block
        reason = "not_a_file" if isinstance(error, FileNotFoundError | IsADirectoryError) else "unreadable"
        raise Failed(reason, error.strerror or "") from None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise Failed("not_a_file", "a folder, pipe or device")
        if found.st_size > limit:
            raise Failed("too_many_bytes", f"{found.st_size:,} bytes, limit {limit:,}")
        with os.fdopen(handle, "rb", closefd=False) as stream:
            return stream.read(count)
    except OSError as error:
        raise Failed("unreadable", error.strerror or "") from None
    finally:
        os.close(handle)
