"""Finds the files that `source.path` names: a file, a folder, a glob or a brace pattern, local or
an fsspec URL. Also what sources share to read parts of such files.
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
from pipelines.sources.base import Source, TransientFailure
from stages.base import Failed
from stages.record import PROVENANCE
from stages.storage.remote import file_system, is_local, is_transient

_WILDCARD: Final = re.compile(r"[*?\[{]")
_BLOCK: Final = 1 << 18  # bytes fetched at a time from a remote file while it is listed
_MAX_PROVENANCE: Final = 1000  # characters kept of each provenance value


class ContainerSource(Source):
    """A source whose images lie inside other files, such as tars, local or behind an fsspec URL.

    Images are read by byte range; the container files are never copied or unpacked.
    """

    def __init__(self, config: DatasetConfig) -> None:
        super().__init__(config)
        self._fs: Any
        self._fs, _ = file_system(self.config.path)
        self.concurrency = 1 if is_local(self._fs) else 16


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that `source.path` names.

    fs: its fsspec file system. name: path relative to the folder above the first wildcard.
    path: path on `fs`. version: see `file_version`.
    """

    fs: Any
    name: str
    path: str
    version: str

    @contextmanager
    def open(self, seekable: bool = True) -> Iterator[IO[bytes]]:
        """Opens the file for reading, at its start.

        seekable: whether the caller seeks in it. Raises SourceError if the file can't be read,
        also for errors of the file system inside the `with` block.
        """
        with (
            _file_errors_as_source_error(self.path),
            self.fs.open(self.path, "rb", block_size=_BLOCK) as stream,
        ):
            try:
                if seekable:
                    stream.seek(0, io.SEEK_END)
                    stream.seek(0)
            except ValueError:
                raise SourceError(
                    f"{self.path} can't be read in parts: its server doesn't support range "
                    "requests. Copy it here first."
                ) from None
            yield cast(IO[bytes], stream)


def find_files(path: str, extensions: tuple[str, ...], output: str) -> Iterator[SourceFile]:
    """Yields the files that `path` names, sorted by path.

    If `path` is a folder: the files in it, at any depth, with one of `extensions`. Files inside
    `output` are left out. Raises SourceError if no file is left, or if a file that is named
    without a wildcard doesn't exist.
    """
    with _file_errors_as_source_error(path):
        fs, plain = file_system(path)
        root, info_by_path = _matching_files(fs, plain, extensions)
        output_fs, output_path = file_system(output) if output else (None, "")
    count = 0
    for file_path, info in info_by_path.items():
        if (
            output_fs is not None
            and output_fs.protocol == fs.protocol
            and file_path.startswith(f"{output_path}/")
        ):
            continue
        count += 1
        name = to_unicode(file_path[len(root) :].lstrip("/"))
        yield SourceFile(fs, name, file_path, file_version(info))
    if not count:
        raise SourceError(
            f"source.path={path!r} names no file. Give a {extensions[0]} file, a folder of them, "
            "or a pattern."
        )


def _matching_files(
    fs: Any, plain: str, extensions: tuple[str, ...]
) -> tuple[str, dict[str, dict[str, Any]]]:
    """Returns (root that names are relative to, path → fsspec info of each file)."""
    if fs.isfile(plain):
        return plain.rpartition("/")[0], {plain: fs.info(plain)}
    if fs.isdir(plain):
        listing = fs.find(plain, detail=True)
        return plain, {
            path: listing[path] for path in sorted(listing) if path.lower().endswith(extensions)
        }
    files: dict[str, dict[str, Any]] = {}
    for pattern in _expand_braces(plain):
        is_glob = _WILDCARD.search(pattern)
        matches = fs.glob(pattern, detail=True) if is_glob else {pattern: fs.info(pattern)}
        files.update(
            (path, matches[path]) for path in sorted(matches) if matches[path].get("type") == "file"
        )
    first = _WILDCARD.search(plain)
    return plain[: first.start() if first else None].rpartition("/")[0], files


def _expand_braces(pattern: str) -> Iterator[str]:
    """Yields `pattern` with its braces expanded. Raises SourceError if they aren't balanced."""
    try:
        yield from braceexpand(pattern, escape=False)
    except ValueError:
        raise SourceError(
            f"source.path={pattern!r}: its braces don't match. Write x-{{000..012}}.tar"
        ) from None


@contextmanager
def _file_errors_as_source_error(path: str) -> Iterator[None]:
    """Turns file system errors raised in the block into SourceError."""
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
    """Returns the file's bytes from `start` up to `end`, fewer if it ends earlier.

    Raises Failed: not_a_file, unreadable; TransientFailure: unreachable.
    """
    try:
        data: bytes = fs.cat_file(path, start=start, end=end)
    except FileNotFoundError:
        raise Failed("not_a_file", "it is gone") from None
    except Exception as error:  # noqa: BLE001 - each file system raises its own
        if is_transient(error):
            raise TransientFailure("unreachable", f"{type(error).__name__}: {error}") from None
        raise Failed("unreadable", f"{type(error).__name__}: {error}") from None
    return data


def file_version(info: Mapping[str, Any]) -> str:
    """Returns a value that changes whenever the file may have changed: its ETag or modification
    time from fsspec's `info`; "" if neither is known.
    """
    version = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("mtime")
    return str(version or "").strip('"')


def to_unicode(name: str) -> str:
    """Returns `name` as valid Unicode: undecodable bytes (surrogate escapes) become escape
    sequences, as in caf\\xe9.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def provenance_json(values: Any) -> str:
    """Returns Input.provenance from a mapping of names to values.

    Keeps those of PROVENANCE that are non-empty text, at most 1000 characters of each; ""
    if there are none or `values` isn't a mapping. A person may also be a whole number.
    """
    if not isinstance(values, Mapping):
        return ""
    stated = {name: values.get(name) for name in PROVENANCE}
    stated["person"] = _person(stated["person"])
    texts = {
        name: value[:_MAX_PROVENANCE].encode("utf-8", "replace").decode()
        for name, value in stated.items()
        if isinstance(value, str) and value
    }
    return json.dumps(texts, ensure_ascii=False) if texts else ""


def _person(value: Any) -> Any:
    """Returns the text of a person's id, which may be a number. A column of whole numbers with
    empty cells often holds floats.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return value.strip() if isinstance(value, str) else value
