"""Images as single files: a folder or a glob, local or an fsspec URL (s3://, gs://, https://, …).

A name with an image's extension that isn't a regular file (a folder, a dangling link, a pipe) is
listed with size -1. Reading it fails with `not_a_file`; devices and pipes are never opened.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Final
from urllib.parse import unquote

from configs.errors import SourceError
from configs.schema import DatasetConfig, SourceConfig
from pipelines.sources.base import Input, Source, TransientFailure
from pipelines.sources.passed_over import Kind, PassedOver
from pipelines.sources.paths import file_version, provenance_json
from stages.base import Failed
from stages.formats import HEAD, READABLE, READABLE_ENDINGS, UNREADABLE_ENDINGS, format_of
from stages.storage.remote import file_system, is_transient

_WILDCARD = re.compile(r"[*?\[]")
_MAX_MISSES: Final = 1000
_MAX_ENDINGS: Final = 1000  # counted one by one; the rest are counted together


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
        self.passed_over = PassedOver()
        others = _Others(config.path, top, self.passed_over)
        for folder, folders, files in os.walk(top, onerror=others.note_unlisted):
            folders[:] = [
                name for name in folders if os.path.realpath(os.path.join(folder, name)) != output
            ]
            for names, note in ((files, others.note_file), (folders, others.note_folder)):
                for name in names:
                    path = os.path.join(folder, name)
                    ending = os.path.splitext(os.fsdecode(name))[1].lower()
                    if ending not in config.extensions:
                        note(path, ending)
                        continue
                    item = self._input(top, os.path.relpath(path, top))
                    if pattern is None or pattern.fullmatch(item.source):
                        yield item

    def _input(self, top: bytes, path: bytes) -> Input:
        source = _to_text(path)
        item = Input(source=source, locator=path, provenance=_provenance(self.config, source))
        try:
            info = os.stat(os.path.join(top, path))
        except OSError:
            return item
        if not stat.S_ISREG(info.st_mode):
            return item
        return replace(item, size=info.st_size, version=str(info.st_mtime_ns))

    def read(self, item: Input, count: int = -1) -> bytes:
        """Raises Failed: not_a_file, unreadable, too_many_bytes."""
        root, _ = split_glob(self.config.path)
        return read_file(os.path.join(os.fsencode(root), item.locator), self.max_bytes, count)


class _Others:
    """Finds what `LocalFiles` passes over: images with other endings, and folders it can't enter.

    A file with another ending costs a stat, and if it is a regular file one read of HEAD bytes. Of
    each ending no more files are opened after _MAX_MISSES in a row that hold no image:
    a million labels beside a million images cost a thousand reads.
    """

    def __init__(self, path: str, top: bytes, passed_over: PassedOver) -> None:
        """path: source.path. top: the folder that names are relative to."""
        self._top, self._passed_over = top, passed_over
        _, self._files = split_glob(path)
        self._folders = _folder_pattern(path)
        self._misses: Counter[str] = Counter()  # by ending

    def note_file(self, path: bytes, ending: str) -> None:
        """Looks into a file. ending: of its name, lower case, with a dot; not a listed one."""
        ending = ending.encode("utf-8", "backslashreplace").decode()
        counted = ending if ending in self._misses or len(self._misses) < _MAX_ENDINGS else ""
        if self._misses[counted] >= _MAX_MISSES:
            return
        name = self._name(path)
        if self._files is not None and not self._files.fullmatch(name):
            return
        try:
            head = read_file(path, sys.maxsize, HEAD)
        except Failed:  # a pipe, a device, a link to nothing, or not readable
            return
        image = format_of(head, ending)
        self._misses[counted] = 0 if image else self._misses[counted] + 1
        if image:
            kind = Kind.IMAGE if image in READABLE else Kind.UNSUPPORTED_IMAGE
            self._passed_over.add(kind, name, ending)

    def note_folder(self, path: bytes, ending: str) -> None:
        """Notes a folder that is a link, unless its target is listed anyway."""
        if os.path.islink(path) and self._may_hold_images(path):
            top, target = os.path.realpath(self._top), os.path.realpath(path)
            if os.path.commonpath([top, target]) != top:
                self._passed_over.add(Kind.LINKED_FOLDER, self._name(path))

    def note_unlisted(self, error: OSError) -> None:
        """Notes a folder that the file system refuses to list."""
        path = os.fsencode(error.filename)
        if path == self._top or self._may_hold_images(path):
            self._passed_over.add(Kind.UNLISTED_FOLDER, f"{self._name(path)}: {error.strerror}")

    def _may_hold_images(self, folder: bytes) -> bool:
        return self._folders is None or self._folders.fullmatch(self._name(folder)) is not None

    def _name(self, path: bytes) -> str:
        return _to_text(os.path.relpath(path, self._top))


class RemoteFiles(Source):
    """Files behind an fsspec URL. Requests that fail for a transient reason are retried."""

    concurrency = 16

    def __init__(self, config: DatasetConfig) -> None:
        super().__init__(config)
        root, self._pattern = split_glob(self.config.path)
        self._fs, path = file_system(root)
        self._root = path.rstrip("/")

    def list(self) -> Iterator[Input]:
        self.passed_over = PassedOver()
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
                    continue
                item = self._input(path, entry)
                if self._pattern is not None and not self._pattern.fullmatch(item.source):
                    continue
                ending = os.path.splitext(name)[1].lower()
                if ending in self.config.extensions:
                    yield item
                # by name only: each look into a file would be a request
                elif ending in READABLE_ENDINGS:
                    self.passed_over.add(Kind.IMAGE, item.source, ending)
                elif ending in UNREADABLE_ENDINGS:
                    self.passed_over.add(Kind.UNSUPPORTED_IMAGE, item.source, ending)

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
                name = folder[len(self._root) :].lstrip("/")
                self.passed_over.add(Kind.EMPTY_NAME, f"{name or '.'}//")
        return entries

    def _input(self, path: str, entry: dict[str, Any]) -> Input:
        source = path[len(self._root) :].lstrip("/")
        source = unquote(source) if path.startswith(("http://", "https://")) else source
        size = entry.get("size")
        return Input(
            source=source,
            locator=path.encode(),
            size=-1 if size is None else int(size),
            version=file_version(entry),
            provenance=_provenance(self.config, source),
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


def _provenance(config: SourceConfig, source: str) -> str:
    """Returns Input.provenance of a file. source: its name, relative to the source's folder.

    With `source.person_folder`, the folder directly above the file names the person. A file has
    none if it lies in no folder of the source, or in or below one whose name begins with `_`.
    """
    folders = source.split("/")[:-1] if config.person_folder else []
    unnamed = any(folder.startswith("_") for folder in folders)
    return provenance_json({"person": "" if unnamed or not folders else folders[-1]})


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


def _folder_pattern(path: str) -> re.Pattern[str] | None:
    """Returns a pattern for the relative names of folders in which files can match the glob `path`;
    None if it is a plain folder.
    """
    if split_glob(path)[1] is None:
        return None
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if _WILDCARD.search(part))
    from fsspec.utils import glob_translate

    ends = range(first + 1, len(parts) + ("**" in parts[-1]))
    return re.compile("|".join(glob_translate("/".join(parts[first:end])) for end in ends) or r"\Z")


def _to_text(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace").replace(os.sep, "/")


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
