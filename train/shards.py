"""ShardSet: the samples on one side of a data set's split, numbered, each read by its number.

Sidecars say where in its tar each sample is; an index of them (train/index.py) is made once. A
sample is one ranged read, a batch's samples are fetched together, and no tar is unpacked or read
from its start.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import ConfigError, EmptySideError, ShardError, SourceError
from stages.record import Record, Status
from stages.storage import layout
from stages.storage.manifest import Manifest
from stages.storage.reader import IDENTITIES_SCHEMA, DatasetReader, SamplePlace
from stages.storage.store import Store
from train.cache import SampleCache
from train.index import FORMAT, NO_IDENTITY, SampleIndex, ShardSamples, open_index, write_index

INDEX: Final = "index"  # folder of a run's indexes
_READERS: Final = 16  # sidecars read at a time
_AHEAD: Final = 64  # sidecars in memory
_ROWS: Final = 65_536  # of identities.parquet in memory
_COLUMNS: Final = ("key", "tar_offset", "tar_size", "sample_sha256", "width", "height")
_PEOPLE: Final = ("key", "shard", "identity_id", "split")
_REBUILD: Final = "Remove its manifest and run make dataset again: it makes the shard again."


class ShardSet:
    """Every sample on one side of a data set's split, in the order of shards and of their tars.

    data: OUT of make dataset, a folder or fsspec URL without credentials. split: train, val or all.
    index_folder: local folder for its index, which is read if it is there and made otherwise; None
    makes it in a temporary folder. cache: for the samples of a remote data set. digest: equal
    digests mean equal samples in equal order. index_file: name of the index. Raises ConfigError for
    a `data` that can't be opened, SourceError if there is no data set or no sample, ShardError if a
    shard contradicts its manifest, StoreError if the index can't be written.

    tars: number of each shard that has samples → digest of its tar. made_from: number of each shard
    → its manifest's `inputs_digest`.
    """

    def __init__(
        self,
        data: str,
        split: str = "all",
        index_folder: Path | None = None,
        cache: SampleCache | None = None,
    ) -> None:
        self.data = data
        reader = self._reader()
        self._cache = None if reader.store.local else cache
        sizes = reader.store.sizes(layout.SHARDS)
        manifests = list(reader.manifests(names=sizes).values())
        if not manifests:
            raise SourceError(
                f"{data}: no shards there (looked for {data}/shards/*.json). Run make dataset "
                "first, then give its output here, as in data=runs/dataset."
            )
        _check_tars(reader, manifests, sizes)
        self.tars: Final = {m.index: m.tar.sha256 for m in manifests if m.written}
        self.made_from: Final = {m.index: m.inputs_digest for m in manifests}
        people = _people_digest(reader.store)
        if split != "all" and not people:
            raise SourceError(
                f"{data}: it has no identities.parquet, so it isn't split yet. Run make dataset to "
                "its end, or train with split=all."
            )
        name = _name(manifests, people, split)
        if index_folder is None:
            with tempfile.TemporaryDirectory(prefix="index-") as folder:
                self._index = _index(reader, manifests, split, Path(folder), name)
        else:
            self._index = _index(reader, manifests, split, index_folder, name)
        self.digest: Final = self._index.digest
        self.index_file: Final = _file_of(name)
        if not len(self) and any(manifest.written for manifest in manifests):
            raise EmptySideError(
                f"{data}: none of its samples is on the side split={split}. Train with "
                "split=all, or make the data set again with another global_pass.val_share."
            )
        if not len(self):
            raise SourceError(
                f"{data}: its {len(manifests)} shards hold no sample; the report under "
                f"{data}/report says why inputs were dropped. Run make dataset on other images."
            )

    def __len__(self) -> int:
        return len(self._index)

    def key(self, number: int) -> str:
        """Returns the key of the sample. `number`: 0 up to the number of samples."""
        return self._index.key(number)

    def number(self, key: str) -> int | None:
        """Returns the number of the sample with this key; None if there is none on this side."""
        return self._index.number(key)

    def others(self, number: int) -> Sequence[int]:
        """Returns the numbers of the other samples of the same person on this side, in order; none
        if the data set has no identities yet.
        """
        return self._index.others(number)

    def pixels(self) -> tuple[Any, Any]:
        """Returns widths and heights of the samples' images, (n,) int32 each."""
        return self._index.pixels()

    def with_others(self) -> int:
        """Returns how many samples have another of the same person on this side."""
        return self._index.with_others()

    def people_digest(self) -> str:
        """Returns a digest of who is shown: equal digests mean that `others` returns the same."""
        return self._index.people_digest()

    def place(self, number: int) -> SamplePlace:
        """Returns where the sample is."""
        return self._index.place(number)

    def shard_of(self, number: int) -> str:
        """Returns the name of the tar that has the sample."""
        return self._index.tar(number)

    def records(self, numbers: Sequence[int], *, verify: bool = True) -> list[Record | ShardError]:
        """Returns the records of those samples, in that order; for a damaged one, the error.

        verify: compare the bytes of each with its digest. Raises ShardError if a tar is missing.
        """
        reader, places, parts = self._parts(numbers)
        return [reader.sample_in(parts.pop(), place, verify=verify) for place in places]

    def members(
        self, numbers: Sequence[int], *, verify: bool = True
    ) -> list[dict[str, bytes] | ShardError]:
        """Returns the files of those samples, by extension, in that order; for a damaged one, the
        error. Otherwise as `records`.
        """
        reader, places, parts = self._parts(numbers)
        return [reader.members_in(parts.pop(), place, verify=verify) for place in places]

    def _parts(
        self, numbers: Sequence[int]
    ) -> tuple[DatasetReader, list[SamplePlace], list[bytes]]:
        """Returns a reader, the samples' places, and their bytes in reverse order, so that each can
        be freed when it has been parsed.
        """
        # A new reader: a worker process can't share its parent's connections.
        reader, places = self._reader(), [self.place(number) for number in numbers]
        read = reader.parts_at
        parts = read(places) if self._cache is None else self._cache.read(places, read)
        return reader, places, parts[::-1]

    def dataset_config(self) -> str:
        """Returns the data set's own configuration, as YAML; "" if it has none."""
        return self._reader().config_text()

    def _reader(self) -> DatasetReader:
        try:
            return DatasetReader(self.data)
        except ConfigError as error:
            raise ConfigError(f"data: {error}") from error


def _check_tars(
    reader: DatasetReader, manifests: Iterable[Manifest], sizes: Mapping[str, int]
) -> None:
    """Raises ShardError if a tar is missing or hasn't the size that its manifest states. sizes: of
    the files, by name.
    """
    for manifest in manifests:
        tar, size = manifest.tar, sizes.get(manifest.tar.name)
        if size is None:
            raise ShardError(f"{reader}: {tar.name} is missing. {_REBUILD}")
        if size != tar.bytes:
            raise ShardError(
                f"{reader}: {tar.name} holds {size:,} bytes, its manifest says {tar.bytes:,}. "
                f"{_REBUILD}"
            )


def _people_digest(store: Store) -> str:
    """Returns a digest that changes with identities.parquet; "" if there is none. It is that of the
    end of the file, which holds the digest of what the identities were made from.
    """
    try:
        size = store.size(layout.IDENTITIES)
    except FileNotFoundError:
        return ""
    length = int.from_bytes(store.read(layout.IDENTITIES, max(0, size - 8), size)[:4], "little")
    end = store.read(layout.IDENTITIES, max(0, size - 8 - length), size)
    return hashlib.sha256(size.to_bytes(8) + end).hexdigest()


def _name(manifests: Iterable[Manifest], people: str, split: str) -> str:
    """Returns the name of the index: a digest of all that it depends on."""
    shards = [(m.shard, m.written, m.tar.sha256, m.sidecar.sha256) for m in manifests]
    return hashlib.sha256(json.dumps([FORMAT, split, people, shards]).encode()).hexdigest()


def _file_of(name: str) -> str:
    return f"{name}.arrow"


def _index(
    reader: DatasetReader, manifests: Sequence[Manifest], split: str, folder: Path, name: str
) -> SampleIndex:
    """Returns the index from the folder; makes it if it isn't there or is damaged."""
    path = folder / _file_of(name)
    index = open_index(path, name)
    if index is None:
        shards = _chosen(reader, manifests, split)
        write_index(path, name, shards, whole=split == "all")
        index = SampleIndex(path)
    return index


def _chosen(
    reader: DatasetReader, manifests: Sequence[Manifest], split: str
) -> Iterator[ShardSamples]:
    """Yields the samples of each shard on one side of the split."""
    people = _people(reader)
    shard, rows = next(people, (-1, _NOBODY))
    for manifest, places in _all_places(reader, manifests):
        while shard < manifest.index and shard >= 0:
            shard, rows = next(people, (-1, _NOBODY))
        own = rows if shard == manifest.index else _NOBODY
        row = pc.index_in(places.column("key"), own.column("key").combine_chunks())
        if split != "all":
            chosen = pc.equal(own.column("split").combine_chunks().take(row), split)
            places, row = places.filter(chosen), row.filter(chosen)
        yield ShardSamples(
            manifest=manifest,
            key=places.column("key").to_pylist(),
            offset=places.column("tar_offset").to_numpy(),
            size=places.column("tar_size").to_numpy(),
            sha256=_digests(places.column("sample_sha256").to_pylist()),
            identity=_numbers(own.column("identity_id").to_pylist(), row),
            width=places.column("width").to_numpy(),
            height=places.column("height").to_numpy(),
        )


def _all_places(
    reader: DatasetReader, manifests: Sequence[Manifest]
) -> Iterator[tuple[Manifest, pa.Table]]:
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(manifests), _AHEAD):
            part = manifests[start : start + _AHEAD]
            yield from zip(part, pool.map(partial(_places, reader), part), strict=True)


def _places(reader: DatasetReader, manifest: Manifest) -> pa.Table:
    """Returns where a shard's samples are, in the order of its tar."""
    rows = reader.rows(manifest.index, _COLUMNS, Status.OK).sort_by("tar_offset")
    if not manifest.written:
        return rows.slice(0, 0)
    end = rows.column("tar_offset")[-1].as_py() + rows.column("tar_size")[-1].as_py() if rows else 0
    if len(rows) != manifest.written or end > manifest.tar.bytes:
        raise ShardError(
            f"{reader}: {manifest.shard} has {manifest.written} samples, its sidecar places "
            f"{len(rows)}. {_REBUILD}"
        )
    return rows


_NOBODY: Final = pa.schema([IDENTITIES_SCHEMA.field(name) for name in _PEOPLE]).empty_table()


def _people(reader: DatasetReader) -> Iterator[tuple[int, pa.Table]]:
    """Yields (number, rows of identities.parquet) of each shard that has rows, in order. Raises
    ShardError if the file has them in another order.
    """
    present, parts = -1, list[pa.Table]()
    if not reader.store.exists(layout.IDENTITIES):
        return
    with reader.store.parquet(layout.IDENTITIES) as file:
        for batch in file.iter_batches(_ROWS, columns=[*_PEOPLE], use_threads=False):
            shards = batch.column("shard").to_numpy()
            numbers, starts = np.unique(shards, return_index=True)
            if len(shards) and ((np.diff(shards) < 0).any() or shards[0] < present):
                raise ShardError(
                    f"{reader}/{layout.IDENTITIES}: its rows are not in the order of shards. "
                    "Remove the file and run make dataset again: it writes it again."
                )
            table, ends = pa.table(batch), [*starts[1:], len(shards)]
            for number, start, end in zip(numbers.tolist(), starts, ends, strict=True):
                if number != present and parts:
                    yield present, pa.concat_tables(parts)
                    parts = []
                present = number
                parts.append(table.slice(start, end - start))
    if parts:
        yield present, pa.concat_tables(parts)


def _digests(texts: Sequence[str | None]) -> Any:
    """Returns digests (n, 32) uint8 of hexadecimal ones; zeros for those that are unknown."""
    data = b"".join(bytes.fromhex(text) if text else bytes(32) for text in texts)
    return np.frombuffer(data, np.uint8).reshape(-1, 32)


def _numbers(identities: Sequence[str], rows: pa.Array) -> Any:
    """Returns a number for the identity of each row, (n,) int64; -1 where the row is null."""
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in identities]
    numbers = [int.from_bytes(digest) >> 1 for digest in digests]
    chosen = np.array([*numbers, NO_IDENTITY], np.int64)
    return chosen[pc.fill_null(rows, len(numbers)).to_numpy(zero_copy_only=False)]
