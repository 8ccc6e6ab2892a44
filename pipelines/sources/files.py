"""Pictures as files: a folder, a glob, or an fsspec URL of either (s3://, gs://, hf://, https://,
…).

A name that ends like a picture but is no regular file (a folder, a dangling link, a pipe) is listed
with size -1 and never opened blindly.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import unquote

from configs.errors import SourceError
from configs.schema import DatasetConfig
from pipelines.sources.base import Input, Source, Transient
from pipelines.sources.paths import version_of
from stages.base import Failed
from stages.storage.remote import file_system, is_transient

logger = logging.getLogger(__name__)

_MAGIC = re.compile(r"[*?\[]")


class LocalFiles(Source):
    """Files under a folder of this machine (or of a file system that every node mounts), or those a
    glob names.
    """

    def list(self) -> Iterator[Input]:
        config = self.config
        root, pattern = split_glob(config.path)
        if not os.path.isdir(root):
            raise SourceError(
                f"source.path={config.path!r} is not a folder. Give a folder of "
                f"{', '.join(config.extensions)}, "
                "a glob, or an fsspec URL."
            )
        skip = os.fsencode(os.path.realpath(self.output)) if self.output else b""
        top = os.fsencode(root)
        for folder, folders, files in os.walk(top, onerror=_unlisted):
            folders[:] = [
                name for name in folders if os.path.realpath(os.path.join(folder, name)) != skip
            ]
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
        return Input(
            source=source, locator=path, size=found.st_size, version=str(found.st_mtime_ns)
        )

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
        self._fs, path = file_system(root)
        self._root = path.rstrip("/")

    def list(self) -> Iterator[Input]:
        folders = [self._root]
        while folders:
            folder = folders.pop()
            for found in self._entries(folder):
                path = found["name"].rstrip("/")
                above, _, name = path.rpartition("/")
                # the folder's own mark; on the web, a link to elsewhere
                if above != folder or not name:
                    continue
                if found["type"] == "directory":
                    folders.append(path)
                elif os.path.splitext(name)[1].lower() in self.config.extensions:
                    item = self._input(path, found)
                    if self._pattern is None or self._pattern.fullmatch(item.source):
                        yield item

    def _entries(self, folder: str) -> Iterable[dict[str, Any]]:
        try:
            found: list[dict[str, Any]] = self._retrying(
                self._ask, self._fs.ls, folder, detail=True
            )
        except FileNotFoundError:
            if folder != self._root:
                return []  # it has gone since
            raise SourceError(
                f"source.path={self.config.path!r} isn't there. Give another folder or glob."
            ) from None
        except Exception as error:  # each file system raises its own
            raise SourceError(
                f"source.path={self.config.path!r} can't be listed at {folder}: {error}. Check "
                "that it exists and that "
                "its keys and endpoint are in the environment, then run again."
            ) from error
        for entry in found:
            if entry["type"] == "directory" and entry["name"] == f"{folder}/":
                logger.warning(
                    "%s: names with // in them can't be listed, and are left out", folder
                )
        return found

    def _input(self, path: str, found: dict[str, Any]) -> Input:
        source = path[len(self._root) :].lstrip("/")
        size = found.get("size")
        return Input(
            source=unquote(source) if path.startswith(("http://", "https://")) else source,
            locator=path.encode(),
            size=-1 if size is None else int(size),
            version=version_of(found),
        )

    def read(self, item: Input, count: int = -1) -> bytes:
        """Raises Failed: not_a_file, unreadable, too_many_bytes; Transient: unreachable."""
        if item.size > self.limit:
            raise Failed("too_many_bytes", f"{item.size:,} bytes, limit {self.limit:,}")
        end = self.limit + 1 if count < 0 else count
        # no part of an empty file can be asked for
        part = {"start": 0, "end": end} if item.size else {}
        try:
            data: bytes = self._ask(self._fs.cat_file, item.locator.decode(), **part)[:end]
        except FileNotFoundError:
            raise Failed("not_a_file", "it is gone") from None
        except Failed:
            raise
        except Exception as error:  # noqa: BLE001 - each file system raises its own
            raise Failed("unreadable", f"{type(error).__name__}: {error}") from None
        if len(data) > self.limit:
            raise Failed("too_many_bytes", f"over {self.limit:,} bytes")
        return data

    def _ask(self, function: Callable[..., Any], path: str, **options: Any) -> Any:
        """Raises Transient where the same question may be answered in a moment."""
        try:
            return function(path, **options)
        except Exception as error:
            if is_transient(error):
                raise Transient("unreachable", f"{type(error).__name__}: {error}") from None
            raise


def _unlisted(error: OSError) -> None:
    logger.warning(
        "%s can't be listed (%s): its pictures are left out", error.filename, error.strerror
    )


def split_glob(path: str) -> tuple[str, re.Pattern[str] | None]:
    """The folder above the first wildcard, and a pattern for names relative to it; no pattern for a
    plain folder.
    """
    if not _MAGIC.search(path) or os.path.isdir(path):
        return path.rstrip("/") or path, None
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    from fsspec.utils import glob_translate

    return "/".join(parts[:first]) or ("/" if path.startswith("/") else "."), re.compile(
        glob_translate("/".join(parts[first:]))
    )


def read_file(path: bytes, limit: int, count: int = -1) -> bytes:
    """A regular file's bytes, or the first `count`. Raises Failed: not_a_file, unreadable,
    too_many_bytes (`limit`).
    """
    try:
        _check_regular(os.stat(path))  # nothing else is opened: that alone sets some devices going
        # it may be a pipe by now, which then can't block
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        nowhere = isinstance(error, FileNotFoundError) or error.errno == errno.ELOOP
        raise Failed("not_a_file" if nowhere else "unreadable", error.strerror or "") from None
    try:
        found = os.fstat(handle)
        _check_regular(found)
        if found.st_size > limit:
            raise Failed("too_many_bytes", f"{found.st_size:,} bytes, limit {limit:,}")
        with os.fdopen(handle, "rb", closefd=False) as stream:
            data = stream.read(limit + 1 if count < 0 else count)
    except OSError as error:
        raise Failed("unreadable", error.strerror or "") from None
    finally:
        os.close(handle)
    if len(data) > limit:  # it has grown, or hid its size
        raise Failed("too_many_bytes", f"over {limit:,} bytes")
    return data


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise Failed("not_a_file", "a folder, pipe, socket or device")
