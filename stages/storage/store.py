"""Store: reads and writes files under one output, a folder or fsspec URL.

A file is written completely or not at all. Calls to a remote store are retried, with growing
pauses, if their failure may be temporary.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final, cast
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.utils import merge_offset_ranges
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from configs.errors import ConfigError, ShardError, StoreError
from stages.storage import layout
from stages.storage.remote import file_system, is_local, is_transient

_TEMPORARY: Final = ".tmp-"
TRIES: Final = 8  # attempts for each call to a remote store
# errors that the user can correct
_UNWRITABLE: Final = (
    *("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EEXIST", "ENOENT"),
)
_AT_ONCE: Final = 64  # files requested together
_GAP: Final = 256 * 1024  # bytes; ranges that are no further apart are read together
_BLOCK: Final = 8 * 1024**2  # bytes; the largest request of several ranges
_IN_MEMORY: Final = 64_000_000  # bytes; larger files of a remote store are read from a local copy


class Store:
    """The files under one output. Names are relative, with forward slashes.

    A file appears by a rename on a file system, and when its upload is complete on an object store:
    no reader ever sees a part of it. Methods raise StoreError if the store fails.
    """

    def __init__(self, url: str) -> None:
        if not url:
            raise ConfigError("no output given. Give a folder or an fsspec URL: output=FOLDER")
        self.url = url
        self._fs: Any
        self._fs, self.root = file_system(url)
        self._retrying = Retrying(
            retry=retry_if_exception(is_transient),
            stop=stop_after_attempt(TRIES),
            wait=wait_random_exponential(multiplier=0.2, max=20),
            reraise=True,
        )
        self.local = is_local(self._fs)

    def path(self, name: str) -> str:
        """Returns the file's path on its file system. Raises ValueError for a name outside the
        store.
        """
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{name!r} would leave the store")
        return f"{self.root}/{name}"

    @contextmanager
    def writer(self, name: str) -> Iterator[IO[bytes]]:
        """Opens a binary stream; the file appears under `name` when the block ends without an
        error.
        """
        if not self.local:
            with tempfile.NamedTemporaryFile(prefix="store-") as scratch:
                yield cast(IO[bytes], scratch)
                scratch.flush()
                self.upload(Path(scratch.name), name)
            return
        target = Path(self.path(name))
        temporary = target.with_name(f".{target.name}{_TEMPORARY}{uuid4().hex[:8]}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(target)
        except OSError as error:
            if errno.errorcode.get(error.errno or 0) in _UNWRITABLE:
                raise StoreError(
                    f"{target} can't be written: {error.strerror}. Free disk space, or correct the "
                    "folder or its permissions; then run the same command again: what is complete "
                    "is kept."
                ) from error
            raise
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def write(self, name: str, data: bytes | str) -> None:
        """Writes a file; replaces one that exists."""
        with self.writer(name) as stream:
            stream.write(data.encode() if isinstance(data, str) else data)

    def upload(self, path: Path, name: str) -> None:
        """Writes a copy of a local file; replaces one that exists."""
        if self.local:
            with self.writer(name) as stream, path.open("rb") as source:
                shutil.copyfileobj(source, stream)
            return
        try:
            self._call(self._fs.put_file, str(path), self.path(name))
        except FileNotFoundError as error:  # the bucket is missing: the local file exists
            raise self._failure(error) from error

    def download(self, name: str, path: Path) -> None:
        """Copies a file to a local path, in a folder that exists. It appears when it is complete.
        Raises FileNotFoundError.
        """
        temporary = path.with_name(f".{path.name}{_TEMPORARY}{uuid4().hex[:8]}")
        try:
            self._call(self._fs.get_file, self.path(name), str(temporary))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def create(self, name: str, data: str) -> None:
        """Writes a file unless it exists. If two processes call it at the same time, one of them
        writes; on an object store without conditional writes, the last one.
        """
        if self.local:
            temporary = f"{name}{_TEMPORARY}{uuid4().hex[:8]}"
            self.write(temporary, data)
            try:
                os.link(self.path(temporary), self.path(name))  # a rename would replace the file
            except FileExistsError:
                return
            finally:
                Path(self.path(temporary)).unlink()
            return
        try:
            self._call(self._fs.pipe_file, self.path(name), data.encode(), mode="create")
        except FileExistsError:
            return
        except (StoreError, FileNotFoundError):
            self.write(name, data)

    def write_if_changed(self, name: str, data: bytes | str) -> None:
        """Writes a file unless it exists with the same bytes."""
        data = data.encode() if isinstance(data, str) else data
        if self.read_all([name]).get(name) != data:
            self.write(name, data)

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Returns the file's bytes, or those from `start` up to `end`. Raises FileNotFoundError."""
        data: bytes = self._call(self._fs.cat_file, self.path(name), start=start, end=end)
        return data

    def read_all(self, names: Sequence[str]) -> dict[str, bytes]:
        """Returns name → bytes of the files that exist. Requests to a remote store are sent
        together.
        """
        contents: dict[str, bytes] = {}
        if self.local:
            for name in names:
                with suppress(FileNotFoundError):
                    contents[name] = self.read(name)
            return contents
        for start in range(0, len(names), _AT_ONCE):
            part = names[start : start + _AT_ONCE]
            responses = self._fs.cat_ranges(
                [self.path(name) for name in part], None, None, on_error="return"
            )
            for name, response in zip(part, responses, strict=True):
                if isinstance(response, bytes):
                    contents[name] = response
                elif not isinstance(response, FileNotFoundError):
                    with suppress(FileNotFoundError):
                        contents[name] = self.read(name)
        return contents

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Returns the bytes of each (name, start, end). Ranges of one file that are near each other
        are read together, and requests to a remote store are sent together. Raises
        FileNotFoundError.
        """
        names, starts, ends = _columns(ranges)
        merged = merge_offset_ranges(names, starts, ends, max_gap=_GAP, max_block=_BLOCK)
        requests = [*zip(*merged, strict=True)]
        parts = self._read_requests(requests)
        result = []
        for name, start, end in ranges:
            # each range is inside the last request that doesn't begin after it
            place = bisect_right(requests, (name, start), key=lambda each: each[:2]) - 1
            first = requests[place][1]
            result.append(parts[place][start - first : end - first])
        return result

    def _read_requests(self, requests: Sequence[tuple[str, int, int]]) -> list[bytes]:
        if self.local:
            return [self.read(*each) for each in requests]
        names, starts, ends = _columns(requests)
        responses = self._fs.cat_ranges(
            [self.path(name) for name in names], starts, ends, on_error="return"
        )
        return [
            response if isinstance(response, bytes) else self.read(*each)
            for response, each in zip(responses, requests, strict=True)
        ]

    def open(self, name: str) -> IO[bytes]:
        """Opens a file for reading; the stream is seekable. Raises FileNotFoundError."""
        if self.local:
            return Path(self.path(name)).open("rb")
        if self._call(self._fs.size, self.path(name)) <= _IN_MEMORY:
            return io.BytesIO(self.read(name))
        scratch = tempfile.NamedTemporaryFile(prefix="store-")  # noqa: SIM115 - it is returned
        self._call(self._fs.get_file, self.path(name), scratch.name)
        return cast(IO[bytes], scratch)

    @contextmanager
    def parquet(self, name: str, stream: IO[bytes] | None = None) -> Iterator[pq.ParquetFile]:
        """Opens a parquet file, so that parts of it can be read. Raises FileNotFoundError, and
        ShardError if it is damaged, also for damage that a read inside the context meets: each page
        that is read is compared with its checksum. Files before version 0.2 have no checksums.

        stream: the file, if it is open already.

        pq.read_table isn't used: threads of pyarrow's data sets may still have a Python stream when
        the interpreter ends, and then abort the process. Local files are read without Python.
        """
        try:
            if self.local and stream is None:
                with pq.ParquetFile(self.path(name), page_checksum_verification=True) as file:
                    yield file
            else:
                with (
                    stream or self.open(name) as opened,
                    pq.ParquetFile(opened, page_checksum_verification=True) as file,
                ):
                    yield file
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # not pyarrow's own
                raise self._failure(error) from error
            how = str(error).rstrip(".")
            raise ShardError(
                f"{self.url}/{name} is damaged: {how}. {layout.how_to_repair(name)}"
            ) from error

    def table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Returns the rows of a parquet file. Raises FileNotFoundError."""
        with self.parquet(name) as file:
            return file.read(columns)

    def write_table_if_changed(self, name: str, table: pa.Table) -> None:
        """Writes a parquet file unless it exists with the same bytes."""
        with io.BytesIO() as out:
            pq.write_table(table, out, compression="zstd", write_page_checksum=True)
            self.write_if_changed(name, out.getvalue())

    def exists(self, name: str) -> bool:
        """Returns whether the file exists."""
        try:
            # `exists` of some file systems is False after any error
            self._call(self._fs.info, self.path(name))
        except FileNotFoundError:
            return False
        return True

    def size(self, name: str) -> int:
        """Returns the file's size in bytes. Raises FileNotFoundError."""
        return int(self._call(self._fs.info, self.path(name))["size"])

    def remove(self, name: str) -> None:
        """Removes a file if it exists."""
        if self.exists(name):
            # an earlier attempt may have removed it although its response was lost
            with suppress(FileNotFoundError):
                self._call(self._fs.rm_file, self.path(name))

    def move(self, source: str, target: str) -> None:
        """Renames a file; replaces one that exists. An object store copies it and deletes the
        original, so that after a kill both may exist. Raises FileNotFoundError.
        """
        if self.local:
            Path(self.path(target)).parent.mkdir(parents=True, exist_ok=True)
            Path(self.path(source)).replace(self.path(target))
            return
        self._call(self._fs.cp_file, self.path(source), self.path(target))
        self.remove(source)

    def names(self, folder: str) -> list[str]:
        """Returns the base names of the files in `folder`, sorted, without temporary files of
        writers; [] if the folder doesn't exist.
        """
        return [name for name in self._all(folder) if _TEMPORARY not in name]

    def sizes(self, folder: str) -> dict[str, int]:
        """Returns base name → size in bytes of the files in `folder`, as `names`."""
        return {
            name: size for name, size in self._entries(folder).items() if _TEMPORARY not in name
        }

    def tree(self, folder: str = "") -> dict[str, int]:
        """Returns name relative to `folder` → size in bytes of all files in it and in the folders
        below; {} if it doesn't exist.
        """
        top = self.path(folder).rstrip("/")
        self._fs.invalidate_cache()
        try:
            entries = self._call(self._fs.find, top, detail=True)
        except FileNotFoundError:  # the bucket is missing
            return {}
        return {
            path.removeprefix(f"{top}/"): int(entry["size"] or 0)
            for path, entry in sorted(entries.items())
            if path.startswith(f"{top}/")
        }

    def sweep(self, folder: str = "", spare: str = "") -> None:
        """Removes the temporary files of killed writers from `folder` ("": the store's top folder),
        except those of the file `spare`. Call it only while no other run writes there.
        """
        for name in self._all(folder):
            if _TEMPORARY in name and not (spare and name.lstrip(".").startswith(spare)):
                self.remove(f"{folder}/{name}" if folder else name)

    def _all(self, folder: str) -> list[str]:
        return sorted(self._entries(folder))

    def _entries(self, folder: str) -> dict[str, int]:
        """Returns base name → size of all that is in `folder`; the size of a folder is 0."""
        self._fs.invalidate_cache()
        try:
            if self.local:  # ten times as fast as `ls`
                return dict(self._call(_local_entries, self.path(folder)))
            entries = self._call(self._fs.ls, self.path(folder), detail=True)
        except FileNotFoundError:
            return {}
        return {
            entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["size"] or 0
            for entry in entries
            if entry["name"].rstrip("/") != self.path(folder).rstrip("/")
        }

    def _call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Calls `function` with retries and returns its result. Raises FileNotFoundError,
        FileExistsError or StoreError.
        """
        try:
            return self._retrying(function, *arguments, **options)
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:  # each file system has its own exceptions
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> StoreError:
        if self.local and isinstance(error, OSError):
            return StoreError(
                f"{error.filename or self.url} can't be read: {error.strerror}. Correct its "
                "permissions; then run the same command again."
            )
        return StoreError(
            f"a request to {self.url} failed: {type(error).__name__}: {error}. Check that it "
            "exists, and that the keys and the endpoint in the environment allow reading, writing, "
            "listing and deleting; then run the same command again: what is complete is kept."
        )


def _local_entries(folder: str) -> list[tuple[str, int]]:
    """Returns (base name, size) of all that is in `folder`."""
    with os.scandir(folder) as entries:
        return [(entry.name, _size(entry)) for entry in entries]


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size if entry.is_file() else 0
    except FileNotFoundError:  # a link to nothing, or it was just removed
        return 0


def _columns(ranges: Sequence[tuple[str, int, int]]) -> tuple[list[str], list[int], list[int]]:
    return [each[0] for each in ranges], [each[1] for each in ranges], [each[2] for each in ranges]
