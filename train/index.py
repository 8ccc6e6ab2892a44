"""SampleIndex: where each sample of a data set is, in an Arrow file that is mapped into memory.

The file has one record batch with a row for each sample, so each column is one array:

    key                  of the sample
    offset, size         of its part of the tar, in bytes
    sha256               of these bytes; zeros: unknown
    identity             a number for the person shown; -1: the data set doesn't say
    width, height        of its image, in pixels
    by_key, by_identity  sorted: a digest of the key, or the identity, in the upper bits, and the
                         sample's number in the lower ones

The schema's metadata has the rest: names of the tars, number of the first sample of each, digests.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import pyarrow as pa

from stages.storage.manifest import Manifest
from stages.storage.reader import SamplePlace
from stages.storage.store import Store

FORMAT: Final = 2  # rises with each change of the file's layout
NO_IDENTITY: Final = -1
_DIGEST_BYTES: Final = 32
_TYPES: Final = {
    "offset": pa.int64(),
    "size": pa.int64(),
    "sha256": pa.binary(_DIGEST_BYTES),
    "identity": pa.int64(),
    "width": pa.int32(),
    "height": pa.int32(),
    "by_key": pa.uint64(),
    "by_identity": pa.uint64(),
}
_SIZES: Final = ("width", "height")
_SLICE: Final = 50_000  # keys that are converted at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSamples:
    """The n samples of a shard to be indexed, in the order of its tar.

    offset, size: (n,) int64, bytes. sha256: (n, 32) uint8, zeros if unknown. identity: (n,) int64,
    0 up to 2**63, or -1. width, height: (n,) int32, pixels of the image.
    """

    manifest: Manifest
    key: Sequence[str]
    offset: Any
    size: Any
    sha256: Any
    identity: Any
    width: Any
    height: Any


class SampleIndex:
    """An index that is open. Workers that are forked share its memory.

    digest: equal digests mean equal samples in equal order. tars: file names of the shards that
    have samples.
    """

    def __init__(self, path: Path) -> None:
        batch, metadata = _opened(path)
        self.name: Final = str(metadata["name"])
        self.digest: Final = str(metadata["digest"])
        self.tars: Final[list[str]] = metadata["tars"]
        self._first: Final[list[int]] = metadata["first"]  # number of each tar's first sample
        self._keys = batch.column("key")
        numbers = [name for name in batch.schema.names if name in _TYPES and name != "sha256"]
        self._values = {name: batch.column(name).to_numpy() for name in numbers}
        digests = batch.column("sha256").buffers()[1]
        self._sha256 = np.frombuffer(digests, np.uint8)[: len(batch) * _DIGEST_BYTES]

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, number: int) -> str:
        """Returns the sample's key."""
        return str(self._keys[number].as_py())

    def tar(self, number: int) -> str:
        """Returns the name of the tar that has the sample."""
        return self.tars[bisect_right(self._first, number) - 1]

    def place(self, number: int) -> SamplePlace:
        """Returns where the sample is."""
        digest = self._sha256[number * _DIGEST_BYTES :][:_DIGEST_BYTES].tobytes()
        return SamplePlace(
            key=self.key(number),
            tar=self.tar(number),
            offset=int(self._values["offset"][number]),
            size=int(self._values["size"][number]),
            sha256=digest.hex() if any(digest) else "",
        )

    def pixels(self) -> tuple[Any, Any]:
        """Returns widths and heights of the samples' images, (n,) int32 each."""
        return self._values["width"], self._values["height"]

    def number(self, key: str) -> int | None:
        """Returns the number of the sample with this key; None if there is none."""
        numbers = self._under("by_key", _digest_of(key.encode()))
        return next((number for number in numbers if self.key(number) == key), None)

    def others(self, number: int) -> list[int]:
        """Returns the numbers of the other samples of the same person, in order; [] if the person
        isn't known.
        """
        identities = self._values["identity"]
        identity = int(identities[number])
        if identity == NO_IDENTITY:
            return []
        numbers = self._under("by_identity", identity)
        return [each for each in numbers if each != number and identities[each] == identity]

    def with_others(self) -> int:
        """Returns how many samples have another of the same person."""
        identities = self._values["identity"]
        _, counts = np.unique(identities[identities != NO_IDENTITY], return_counts=True)
        return int(counts[counts > 1].sum())

    def people_digest(self) -> str:
        """Returns a digest of the samples' identities: if it is equal, so is what `others` returns
        for equal samples.
        """
        return hashlib.sha256(self._values["identity"]).hexdigest()

    def _under(self, column: str, value: int) -> list[int]:
        """Returns the numbers with these upper bits in a sorted column, in order. Other values may
        have the same upper bits.
        """
        low = _low_bits(len(self))
        ends = np.array([value & ~low, value | low], np.uint64)
        entries = self._values[column]
        start = np.searchsorted(entries, ends[0])
        end = np.searchsorted(entries, ends[1], side="right")
        return [int(entry) & low for entry in entries[start:end]]


def open_index(path: Path, name: str) -> SampleIndex | None:
    """Returns the index at `path`; None if there is none, or if it is damaged or isn't `name`."""
    try:
        index = SampleIndex(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # Arrow's are ValueErrors
        return None
    return index if index.name == name else None


def write_index(path: Path, name: str, shards: Iterable[ShardSamples], *, whole: bool) -> None:
    """Writes an index, which appears at `path` when it is complete. Several processes may write it
    at once. Columns are collected in files, not in memory.

    name: of what the index was made from. whole: it has every sample of these shards. Raises
    StoreError if it can't be written.
    """
    with Store(str(path.parent)).writer(path.name) as stream, ExitStack() as stack:

        def file() -> IO[bytes]:  # without a name, so that none is left after a kill
            return stack.enter_context(tempfile.TemporaryFile(dir=path.parent))

        files = {name: file() for name in ("key", "end", *_TYPES)}
        manifests, first, count, end = list[Manifest](), list[int](), 0, 0
        for shard in shards:
            if not len(shard.key):
                continue
            manifests.append(shard.manifest)
            first.append(count)
            keys = [key.encode() for key in shard.key]
            files["key"].write(b"".join(keys))
            ends = end + np.cumsum([len(key) for key in keys])
            digests = np.array([_digest_of(key) for key in keys], np.uint64)
            for column, values in (
                ("end", ends if count else np.insert(ends, 0, 0)),
                ("offset", shard.offset),
                ("size", shard.size),
                ("sha256", shard.sha256),
                ("identity", shard.identity),
                ("width", shard.width),
                ("height", shard.height),
                ("by_key", digests),
                ("by_identity", np.asarray(shard.identity, np.int64).view(np.uint64)),
            ):
                kind = np.int64 if column == "end" else _numpy_type(column)
                files[column].write(np.ascontiguousarray(values, kind).tobytes())
            count, end = count + len(keys), int(ends[-1])
        arrays = _arrays(files, count)
        metadata = {
            "name": name,
            "digest": _digest(manifests, None if whole else arrays["key"]),
            "tars": [manifest.tar.name for manifest in manifests],
            "first": first,
        }
        batch = pa.RecordBatch.from_pydict(arrays, metadata={"index": json.dumps(metadata)})
        with pa.ipc.new_file(stream, batch.schema) as writer:
            writer.write_batch(batch)


def _opened(path: Path) -> tuple[pa.RecordBatch, dict[str, Any]]:
    """Returns the record batch and the metadata of an index."""
    file = pa.ipc.open_file(pa.memory_map(str(path)))
    metadata = json.loads(file.schema.metadata[b"index"])
    batch = file.get_batch(0)
    batch.validate()
    # without sizes: an index of the format before, which `train.seen` reads
    names = [name for name in _TYPES if name in batch.schema.names or name not in _SIZES]
    types = {name: batch.schema.field(name).type for name in names}
    if (
        any(types[name] != _TYPES[name] for name in names)
        or batch.schema.field("key").type != pa.large_string()
    ):
        raise ValueError("columns of other types")
    return batch, metadata


def _arrays(files: dict[str, IO[bytes]], count: int) -> dict[str, pa.Array]:
    """Returns the columns, as arrays in the memory that the files are mapped to."""
    low = _low_bits(count)
    for column in ("by_key", "by_identity"):
        entries = _mapped(files[column], np.uint64)
        for start, end in pairwise([*range(0, count, _SLICE), count]):
            numbers = np.arange(start, end, dtype=np.uint64)
            entries[start:end] = (entries[start:end] & ~np.uint64(low)) | numbers
        entries.sort()  # in place
    data, ends = _mapped(files["key"], np.uint8), _mapped(files["end"], np.int64)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(data)]
    arrays = {"key": pa.Array.from_buffers(pa.large_string(), count, buffers)}
    for name, kind in _TYPES.items():
        data = _mapped(files[name], _numpy_type(name))
        arrays[name] = pa.Array.from_buffers(kind, count, [None, pa.py_buffer(data)])
    return arrays


def _mapped(file: IO[bytes], kind: Any) -> Any:
    file.flush()
    return np.memmap(file, kind, "r+") if file.tell() else np.zeros(0, kind)


def _numpy_type(column: str) -> Any:
    return np.uint8 if column == "sha256" else _TYPES[column].to_pandas_dtype()


def _low_bits(count: int) -> int:
    """Returns a mask of the bits that the numbers of `count` samples need."""
    return (1 << max(0, count - 1).bit_length()) - 1


def _digest_of(key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest())


def _digest(manifests: Iterable[Manifest], keys: pa.Array | None) -> str:
    text = "".join(f"{manifest.shard} {manifest.tar.sha256}\n" for manifest in manifests)
    digest = hashlib.sha256(text.encode())
    if keys is not None:
        for start in range(0, len(keys), _SLICE):
            part = keys.slice(start, _SLICE).to_pylist()
            digest.update("".join(f"{key}\n" for key in part).encode())
    return digest.hexdigest()
