"""Images as single files: a folder or a glob, local or an fsspec URL (s3://, gs://, https://, …).

A name with an image's extension that isn't a regular file (a folder, a dangling link, a pipe) is
listed with size -1. Reading it fails with `not_a_file`; devices and pipes are never opened.
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
from pipelines.sources.base import Input, Source, TransientFailure
from pipelines.sources.paths import file_version
from stages.base import Failed
from stages.storage.remote import file_system, is_transient

logger = logging.getLogger(__name__)

_WILDCARD = re.compile(r"[*?\[]")


class LocalFiles(Source):
    """Files in a folder, at any depth, or files that match a glob.

    The folder is on this machine, or on a file system that every node mounts.
    """

    def list(self) -> Iterator[Input]:
        config = self.config
        root, pattern = split_glob(config.path)
        if not os.path.isdir(root):
            raise SourceError(
                f"source.path={config.path!r} is not a folder. Give a folder of "
                f"{', '.join(config.extensions)}, a glob, or an fsspec URL."
            )
        output = os.fsencode(os.path.realpath(self.output)) if self.output else b""
        top = os.fsencode(root)
        for folder, folders, files in os.walk(top, onerror=_warn_unlisted):
            folders[:] = [
                name for name in folders if os.path.realpath(os.path.join(folder, name)) != output
            ]
            for name in (*files, *folders):
                if os.path.splitext(os.fsdecode(name))[1].lower() in config.extensions:
                    item = self._input(top, os.path.relpath(os.path.join(folder, name), top))
                    if pattern is None or pattern.fullmatch(item.source):
                        yield item

    def _input(self, top: bytes, path: bytes) -> Input:
        source = path.decode("utf-8", "backslashreplace").replace(os.sep, "/")
        try:
            info = os.stat(os.path.join(top, path))
        except OSError:
            return Input(source=source, locator=path)
        if not stat.S_ISREG(info.st_mode):
            return Input(source=source, locator=path)
        return Input(source=source, locator=path, size=info.st_size, version=str(info.st_mtime_ns))

    def read(self, item: Input, count: int = -1) -> bytes:
        """Raises Failed: not_a_file, unreadable, too_many_bytes."""
        root, _ = split_glob(self.config.path)
        return read_file(os.path.join(os.fsencode(root), item.locator), self.max_bytes, count)


class RemoteFiles(Source):
    """Files behind an fsspec URL. Requests that fail for a transient reason are retried."""

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
            for entry in self._entries(folder):
                path = entry["name"].rstrip("/")
                parent, _, name = path.rpartition("/")
                # Object stores list the folder itself too; web pages link to other places.
                if parent != folder or not name:
                    continue
                if entry["type"] == "directory":
                    folders.append(path)
                elif os.path.splitext(name)[1].lower() in self.config.extensions:
                    item = self._input(path, entry)
                    if self._pattern is None or self._pattern.fullmatch(item.source):
                        yield item

    def _entries(self, folder: str) -> Iterable[dict[str, Any]]:
        """Returns fsspec's entries of one folder. Raises SourceError if it can't be listed."""
        try:
            entries: list[dict[str, Any]] = self._retrying(
                self._request, self._fs.ls, folder, detail=True
            )
        except FileNotFoundError:
            if folder != self._root:
                return []  # deleted since its parent was listed
            raise SourceError(
                f"source.path={self.config.path!r} isn't there. Give another folder or glob."
            ) from None
        except Exception as error:  # each file system raises its own
            raise SourceError(
                f"source.path={self.config.path!r} can't be listed at {folder}: {error}. Check "
                "that it exists and that its keys and endpoint are in the environment, then run "
                "again."
            ) from error
        for entry in entries:
            if entry["type"] == "directory" and entry["name"] == f"{folder}/":
                logger.warning(
                    "%s: names with // in them can't be listed, and are left out", folder
                )
        return entries

    def _input(self, path: str, entry: dict[str, Any]) -> Input:
        source = path[len(self._root) :].lstrip("/")
        size = entry.get("size")
        return Input(
            source=unquote(source) if path.startswith(("http://", "https://")) else source,
            locator=path.encode(),
            size=-1 if size is None else int(size),
            version=file_version(entry),
        )

    def read(self, item: Input, count: int = -1) -> bytes:
        """Raises Failed: not_a_file, unreadable, too_many_bytes; TransientFailure: unreachable."""
        if item.size > self.max_bytes:
            raise Failed("too_many_bytes", f"{item.size:,} bytes, limit {self.max_bytes:,}")
        end = self.max_bytes + 1 if count < 0 else count
        # An empty file has no byte range that could be requested.
        byte_range = {"start": 0, "end": end} if item.size else {}
        try:
            path = item.locator.decode()
            data: bytes = self._request(self._fs.cat_file, path, **byte_range)[:end]
        except FileNotFoundError:
            raise Failed("not_a_file", "it is gone") from None
        except Failed:
            raise
        except Exception as error:  # noqa: BLE001 - each file system raises its own
            raise Failed("unreadable", f"{type(error).__name__}: {error}") from None
        if len(data) > self.max_bytes:
            raise Failed("too_many_bytes", f"over {self.max_bytes:,} bytes")
        return data

    def _request(self, function: Callable[..., Any], path: str, **options: Any) -> Any:
        """Calls `function`. Raises TransientFailure if it failed for a transient reason."""
        try:
            return function(path, **options)
        except Exception as error:
            if is_transient(error):
                raise TransientFailure("unreachable", f"{type(error).__name__}: {error}") from None
            raise


def _warn_unlisted(error: OSError) -> None:
    logger.warning(
        "%s can't be listed (%s): its images are left out", error.filename, error.strerror
    )


def split_glob(path: str) -> tuple[str, re.Pattern[str] | None]:
    """Splits a glob into the folder above its first wildcard and a pattern for names relative to
    that folder; the pattern is None if `path` is a plain folder.
    """
    if not _WILDCARD.search(path) or os.path.isdir(path):
        return path.rstrip("/") or path, None
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if _WILDCARD.search(part))
    from fsspec.utils import glob_translate

    return "/".join(parts[:first]) or ("/" if path.startswith("/") else "."), re.compile(
        glob_translate("/".join(parts[first:]))
    )


def read_file(path: bytes, max_bytes: int, count: int = -1) -> bytes:
    """Returns the bytes of a regular file, or the first `count` of them (-1: all).

    Raises Failed: not_a_file, unreadable, too_many_bytes (over `max_bytes`).
    """
    try:
        # Check before opening: opening alone makes some devices act.
        _check_regular(os.stat(path))
        # O_NONBLOCK: should it have become a pipe since the check, opening it can't block.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError) or error.errno == errno.ELOOP
        raise Failed("not_a_file" if missing else "unreadable", error.strerror or "") from None
    try:
        info = os.fstat(handle)
        _check_regular(info)
        if info.st_size > max_bytes:
            raise Failed("too_many_bytes", f"{info.st_size:,} bytes, limit {max_bytes:,}")
        with os.fdopen(handle, "rb", closefd=False) as stream:
            data = stream.read(max_bytes + 1 if count < 0 else count)
    except OSError as error:
        raise Failed("unreadable", error.strerror or "") from None
    finally:
        os.close(handle)
    if len(data) > max_bytes:  # the file has grown, or reported a wrong size
        raise Failed("too_many_bytes", f"over {max_bytes:,} bytes")
    return data


def _check_regular(info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise Failed("not_a_file", "a folder, pipe, socket or device")
