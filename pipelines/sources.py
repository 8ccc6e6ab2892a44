"""Sources: what goes in. Lists a folder, and reads one input into a record.

A name that ends like a picture but is no regular file (a folder, a dangling link, a pipe) is listed with a reason and
never opened blindly.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from configs.errors import SourceError
from configs.schema import DatasetConfig, SourceConfig
from stages.base import Dropped, Failed, reject
from stages.record import Record, key_of

STAGE = "source"


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One planned input. path: relative, as the file system's bytes (names need not be text); size: -1 if no file."""

    source: str
    path: bytes
    size: int
    mtime_ns: int
    duplicate_of: str = ""

    @property
    def key(self) -> str:
        return key_of(self.source)


def list_folder(config: SourceConfig, exclude: str = "") -> Iterator[Input]:
    """Every input under `config.path`, in no particular order; `exclude` is a folder to stay out of (the output).

    Raises SourceError if the folder doesn't exist.
    """
    if not config.path:
        raise SourceError("no source given. Say where the photographs are: source.path=FOLDER")
    root = Path(config.path)
    if not root.is_dir():
        raise SourceError(
            f"source.path={config.path!r} is not a folder. Give a folder of {', '.join(config.extensions)}"
        )
    skip = os.path.realpath(exclude) if exclude else ""
    top = os.fsencode(root)
    for folder, folders, files in os.walk(top):
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(folder, name)) != os.fsencode(skip)]
        for name in (*files, *folders):
            if os.path.splitext(os.fsdecode(name))[1].lower() in config.extensions:
                yield _input(top, os.path.relpath(os.path.join(folder, name), top))


def _input(top: bytes, path: bytes) -> Input:
    source = path.decode("utf-8", "backslashreplace").replace(os.sep, "/")
    try:
        found = os.stat(os.path.join(top, path))
    except OSError:
        return Input(source=source, path=path, size=-1, mtime_ns=0)
    if not stat.S_ISREG(found.st_mode):
        return Input(source=source, path=path, size=-1, mtime_ns=0)
    return Input(source=source, path=path, size=found.st_size, mtime_ns=found.st_mtime_ns)


def read_bytes(root: str, item: Input, limit: int, count: int = -1) -> bytes:
    """The input's bytes, or the first `count` of them. Raises Failed: not_a_file, unreadable, too_many_bytes."""
    try:
        handle = os.open(os.path.join(os.fsencode(root), item.path), os.O_RDONLY | os.O_NONBLOCK)  # a pipe can't block
    except OSError as error:
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


def read_record(config: DatasetConfig, item: Input) -> Record:
    """The record of one input, its image the source's own bytes; ended already where it can't be read or is a copy."""
    record = Record(key=item.key, source=item.source, license=config.source.license, author=config.source.author)
    try:
        if item.duplicate_of:
            raise Dropped("duplicate", f"same bytes as {item.duplicate_of}")
        data = read_bytes(config.source.path, item, config.resize.max_bytes)
    except (Dropped, Failed) as verdict:
        return reject(record, verdict, STAGE)
    return replace(record, image=data, sha256=hashlib.sha256(data).hexdigest())
