"""Store: files under one output folder or fsspec URL, written whole or not at all.

On a remote store every call is tried again, with growing pauses, while its failure may pass.
"""

from __future__ import annotations

import errno
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final, cast
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from configs.errors import ConfigError, StoreError
from stages.storage.remote import file_system, is_local, is_transient

_TEMPORARY: Final = ".tmp-"
TRIES: Final = 8  # of each call to a remote store
# people mend it
_UNWRITABLE: Final = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EEXIST")
_AT_ONCE: Final = 64  # files
_IN_MEMORY: Final = 64_000_000  # bytes; larger files of a remote store are read from a local copy


class Store:
    """Names are relative, with forward slashes. On a file system a file appears by rename, on an
    object store when its upload is complete: no reader ever sees half of one. Raises StoreError
    where the store doesn't do as it is told.
    """

    def __init__(self, url: str) -> None:
        if not url:
            raise ConfigError("no output given. Say where the data set goes: output=FOLDER")
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
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{name!r} would leave the store")
        return f"{self.root}/{name}"

    @contextmanager
    def writer(self, name: str) -> Iterator[IO[bytes]]:
        """A binary stream; the file appears under `name` when the block ends without an error."""
        if not self.local:
            with tempfile.NamedTemporaryFile(prefix="store-") as scratch:
                yield cast(IO[bytes], scratch)
                scratch.flush()
                try:
                    self._call(self._fs.put_file, scratch.name, self.path(name))
                # of the bucket: the file was written a moment ago
                except FileNotFoundError as error:
                    raise self._failure(error) from error
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
                    f"{target} can't be written: {error.strerror}. Make room, or mend the folder "
                    "or its rights; then "
                    "run the same command again: what is committed is kept."
                ) from error
            raise
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def write(self, name: str, data: bytes | str) -> None:
        with self.writer(name) as stream:
            stream.write(data.encode() if isinstance(data, str) else data)

    def create(self, name: str, data: str) -> None:
        """Write unless `name` is there already. Of two that try at once one does, and on an object
        store that knows no conditional writes the last one.
        """
        if self.local:
            whole = f"{name}{_TEMPORARY}{uuid4().hex[:8]}"
            self.write(whole, data)
            try:
                os.link(self.path(whole), self.path(name))  # unlike a rename, this replaces nothing
            except FileExistsError:
                return
            finally:
                Path(self.path(whole)).unlink()
            return
        try:
            self._call(self._fs.pipe_file, self.path(name), data.encode(), mode="create")
        except FileExistsError:
            return
        except (StoreError, FileNotFoundError):
            self.write(name, data)

    def write_if_changed(self, name: str, data: bytes | str) -> None:
        """Writes a file, unless it is there with the very same bytes."""
        data = data.encode() if isinstance(data, str) else data
        if self.read_all([name]).get(name) != data:
            self.write(name, data)

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """The file's bytes, or those from `start` to `end`. Raises FileNotFoundError."""
        data: bytes = self._call(self._fs.cat_file, self.path(name), start=start, end=end)
        return data

    def read_all(self, names: Sequence[str]) -> dict[str, bytes]:
        """name → bytes of those that exist, many at a time where the store is remote."""
        if self.local:
            return {name: self.read(name) for name in names if self.exists(name)}
        found: dict[str, bytes] = {}
        for start in range(0, len(names), _AT_ONCE):
            part = names[start : start + _AT_ONCE]
            answers = self._fs.cat_ranges(
                [self.path(name) for name in part], None, None, on_error="return"
            )
            for name, answer in zip(part, answers, strict=True):
                if isinstance(answer, bytes):
                    found[name] = answer
                elif not isinstance(answer, FileNotFoundError):
                    with suppress(FileNotFoundError):
                        found[name] = self.read(name)
        return found

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """The bytes of each (name, start, end), many at a time where the store is remote. Raises
        FileNotFoundError."""
        if self.local:
            return [self.read(*each) for each in ranges]
        paths = [self.path(name) for name, _, _ in ranges]
        starts, ends = [start for _, start, _ in ranges], [end for _, _, end in ranges]
        answers = self._fs.cat_ranges(paths, starts, ends, on_error="return")
        return [
            answer if isinstance(answer, bytes) else self.read(*each)
            for answer, each in zip(answers, ranges, strict=True)
        ]

    def open(self, name: str) -> IO[bytes]:
        """Seekable, for reading. Raises FileNotFoundError."""
        if self.local:
            return Path(self.path(name)).open("rb")
        if self._call(self._fs.size, self.path(name)) <= _IN_MEMORY:
            return io.BytesIO(self.read(name))
        scratch = tempfile.NamedTemporaryFile(prefix="store-")  # noqa: SIM115 - it is the answer
        self._call(self._fs.get_file, self.path(name), scratch.name)
        return cast(IO[bytes], scratch)

    @contextmanager
    def parquet(self, name: str) -> Iterator[pq.ParquetFile]:
        """A parquet file, to be read in parts. Raises FileNotFoundError.

        Not by pyarrow's data sets, as pq.read_table does: their threads may hold a Python stream
        for longer than Python lives, and then abort the process at its end. A local file is read
        without Python.
        """
        if self.local:
            with pq.ParquetFile(self.path(name)) as file:
                yield file
        else:
            with self.open(name) as stream, pq.ParquetFile(stream) as file:
                yield file

    def table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A parquet file's rows. Raises FileNotFoundError."""
        with self.parquet(name) as file:
            return file.read(columns)

    def write_table_if_changed(self, name: str, table: pa.Table) -> None:
        """Writes a parquet file, unless it is there with the very same bytes."""
        with io.BytesIO() as out:
            pq.write_table(table, out, compression="zstd")
            self.write_if_changed(name, out.getvalue())

    def exists(self, name: str) -> bool:
        try:
            # fsspec's own `exists` is False for some on any error
            self._call(self._fs.info, self.path(name))
        except FileNotFoundError:
            return False
        return True

    def size(self, name: str) -> int:
        """The file's size in bytes. Raises FileNotFoundError."""
        return int(self._call(self._fs.info, self.path(name))["size"])

    def remove(self, name: str) -> None:
        if self.exists(name):
            with suppress(FileNotFoundError):  # an earlier try did it, and its answer was lost
                self._call(self._fs.rm_file, self.path(name))

    def names(self, folder: str) -> list[str]:
        """Base names in `folder`, sorted, without the traces of a killed writer; empty if it
        doesn't exist.
        """
        return [name for name in self._all(folder) if _TEMPORARY not in name]

    def sweep(self, folder: str) -> None:
        """Remove what killed writers left in `folder`. Only while no other run writes there."""
        for name in self._all(folder):
            if _TEMPORARY in name:
                self.remove(f"{folder}/{name}")

    def _all(self, folder: str) -> list[str]:
        self._fs.invalidate_cache()
        try:
            found = self._call(self._fs.ls, self.path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(
            str(path).rsplit("/", 1)[-1]
            for path in found
            if str(path).rstrip("/") != self.path(folder)
        )

    def _call(self, function: Callable[..., Any], *given: Any, **options: Any) -> Any:
        """What `function` gives, in the end. Raises FileNotFoundError, FileExistsError or
        StoreError.
        """
        try:
            return self._retrying(function, *given, **options)
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:  # each file system raises its own
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> StoreError:
        return StoreError(
            f"{self.url} doesn't answer as it should: {type(error).__name__}: {error}. Check "
            "that it exists, that its "
            "keys and endpoint are in the environment and allow reading, writing, listing and "
            "deleting; then run the "
            "same command again: what is committed is kept."
        )
