"""The files a `source.path` names, here or behind an fsspec URL: one, a folder of them, a glob, or
a brace pattern.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Final, cast

from braceexpand import braceexpand

from configs.errors import SourceError
from configs.schema import DatasetConfig
from pipelines.sources.base import FACTS, Source, Transient
from stages.base import Failed
from stages.storage.remote import file_system, is_local, is_transient

_MAGIC: Final = re.compile(r"[*?\[{]")
_BLOCK: Final = 1 << 18  # bytes fetched at a time from a remote file that is listed
_FACT: Final = 1000  # characters


class InsideFiles(Source):
    """A source whose pictures lie inside other files, here or behind an fsspec URL, and are read
    where they lie.
    """

    def __init__(self, config: DatasetConfig) -> None:
        super().__init__(config)
        self._fs: Any
        self._fs, _ = file_system(self.config.path)
        self.concurrency = 1 if is_local(self._fs) else 16


@dataclass(frozen=True, slots=True)
class Found:
    """A file. name: relative to the folder above the first wildcard; path: as its file system takes
    it.
    """

    fs: Any
    name: str
    path: str
    version: str

    @contextmanager
    def open(self, seeking: bool = True) -> Iterator[IO[bytes]]:
        """Its bytes, from their start. Raises SourceError, also for what goes wrong in the block,
        if it can't be read.

        seeking: whether it will be read in parts.
        """
        with _listing(self.path), self.fs.open(self.path, "rb", block_size=_BLOCK) as stream:
            try:
                if seeking:
                    stream.seek(0, io.SEEK_END)
                    stream.seek(0)
            except ValueError:
                raise SourceError(
                    f"{self.path} can't be read in parts: its server sends it whole only. Copy "
                    "it here first."
                ) from None
            yield cast(IO[bytes], stream)


def find_files(path: str, endings: tuple[str, ...], output: str) -> Iterator[Found]:
    """The files that `path` names, sorted; of a folder those with one of `endings`, at any depth,
    but none of `output`.

    Raises SourceError if there is none, or if one that is named outright isn't there.
    """
    with _listing(path):
        fs, plain = file_system(path)
        root, files = _files(fs, plain, endings)
        target, skip = file_system(output) if output else (None, "")
    count = 0
    for name, found in files.items():
        if not (
            target is not None and target.protocol == fs.protocol and name.startswith(f"{skip}/")
        ):
            count += 1
            yield Found(fs, text(name[len(root) :].lstrip("/")), name, version_of(found))
    if not count:
        raise SourceError(
            f"source.path={path!r} names no file. Give a {endings[0]} file, a folder of them, or "
            "a pattern."
        )


def _files(fs: Any, plain: str, endings: tuple[str, ...]) -> tuple[str, dict[str, dict[str, Any]]]:
    """The root of their names, and path → what the file system knows of each."""
    if fs.isfile(plain):
        return plain.rpartition("/")[0], {plain: fs.info(plain)}
    if fs.isdir(plain):
        found = fs.find(plain, detail=True)
        return plain, {
            path: found[path] for path in sorted(found) if path.lower().endswith(endings)
        }
    files: dict[str, dict[str, Any]] = {}
    for part in _parts(plain):
        matches = fs.glob(part, detail=True) if _MAGIC.search(part) else {part: fs.info(part)}
        files.update(
            (name, matches[name]) for name in sorted(matches) if matches[name].get("type") == "file"
        )
    first = _MAGIC.search(plain)
    return plain[: first.start() if first else None].rpartition("/")[0], files


def _parts(pattern: str) -> Iterator[str]:
    """`pattern` with its braces expanded. Raises SourceError where they don't match."""
    try:
        yield from braceexpand(pattern, escape=False)
    except ValueError:
        raise SourceError(
            f"source.path={pattern!r}: its braces don't match. Write x-{{000..012}}.tar"
        ) from None


@contextmanager
def _listing(path: str) -> Iterator[None]:
    """What a file system raises while a source is listed, as SourceError."""
    try:
        yield
    except FileNotFoundError as error:
        raise SourceError(
            f"{error.filename or error.args[0]} isn't there. Check source.path."
        ) from None
    except Exception as error:
        if isinstance(error, OSError) or is_transient(error):
            raise SourceError(f"{path} can't be read: {type(error).__name__}: {error}") from error
        raise


def read_range(fs: Any, path: str, start: int, end: int) -> bytes:
    """The file's bytes from `start` to `end`. Raises Failed: not_a_file, unreadable; Transient:
    unreachable.
    """
    try:
        data: bytes = fs.cat_file(path, start=start, end=end)
    except FileNotFoundError:
        raise Failed("not_a_file", "it is gone") from None
    except Exception as error:  # noqa: BLE001 - each file system raises its own
        if is_transient(error):
            raise Transient("unreachable", f"{type(error).__name__}: {error}") from None
        raise Failed("unreadable", f"{type(error).__name__}: {error}") from None
    return data


def version_of(info: Mapping[str, Any]) -> str:
    """What changes whenever the file may have: its ETag or time of change; "" where neither is
    known.
    """
    found = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("mtime")
    return str(found or "").strip('"')


def text(name: str) -> str:
    """`name` as text that any table can hold: what isn't Unicode in it is written out, as in
    caf\\xe9.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def facts_of(values: Any) -> str:
    """Those of FACTS that are text, as Input.facts; of anything else nothing."""
    if not isinstance(values, Mapping):
        return ""
    given = {name: values.get(name) for name in FACTS}
    facts = {
        name: value[:_FACT].encode("utf-8", "replace").decode()
        for name, value in given.items()
        if isinstance(value, str) and value
    }
    return json.dumps(facts, ensure_ascii=False) if facts else ""
