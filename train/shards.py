"""ShardSet: the samples on one side of a data set's split, numbered, each read by its number.

Sidecars say where in its tar each sample is. A sample is one ranged read, a batch's samples are
fetched together, and no tar is unpacked or read from its start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from configs.errors import ConfigError, ShardError, SourceError
from stages.record import Record, Status
from stages.storage import layout
from stages.storage.manifest import Manifest
from stages.storage.reader import DatasetReader, SamplePlace

_READERS: Final = 16  # sidecars read at a time
_COLUMNS: Final = ("key", "tar_offset", "tar_size", "sample_sha256")
_REBUILD: Final = "Remove its manifest and run make dataset again: it makes the shard again."


class ShardSet:
    """Every sample on one side of a data set's split, in the order of shards and of their tars.

    data: OUT of make dataset, a folder or fsspec URL without credentials. split: train, val or all.
    digest: equal digests mean equal samples in equal order. Raises ConfigError for a `data` that
    can't be opened, SourceError if there is no data set or no sample, ShardError if a shard
    contradicts its manifest.
    """

    def __init__(self, data: str, split: str = "all") -> None:
        self.data = data
        reader = self._reader()
        manifests = list(reader.manifests().values())
        if not manifests:
            raise SourceError(
                f"{data}: no shards there (looked for {data}/shards/*.json). Run make dataset "
                "first, "
                "then give its output here, as in data=runs/dataset."
            )
        with ThreadPoolExecutor(_READERS) as pool:
            places = list(pool.map(lambda manifest: _places(reader, manifest), manifests))
        keys = None if split == "all" else _keys_on_side(reader, split)
        chosen = [_chosen(samples, keys) for samples in places]
        if not any(chosen) and any(places):
            raise SourceError(
                f"{data}: none of its samples is on the side split={split}. Train with "
                "split=all, or "
                "make the data set again with another global_pass.val_share."
            )
        if not any(chosen):
            raise SourceError(
                f"{data}: its {len(manifests)} shards hold no sample; the report under "
                f"{data}/report "
                "says why inputs were dropped. Run make dataset on other images."
            )
        used = [m for m, samples in zip(manifests, chosen, strict=True) if samples]
        samples = [place for places_of_shard in chosen for place in places_of_shard]
        # Arrays, not a million tuples: worker processes are forked with them.
        self.keys: Final = [place.key for place in samples]
        self._tars = np.array([place.tar for place in samples])
        self._spans = np.array([(place.offset, place.size) for place in samples], np.int64)
        digests = b"".join(bytes.fromhex(place.sha256) or bytes(32) for place in samples)
        self._digests = np.frombuffer(digests, np.uint8).reshape(-1, 32)
        self.digest: Final = _digest(used, None if keys is None else self.keys)
        self._numbers = {key: number for number, key in enumerate(self.keys)}
        self._people = _people(reader, self._numbers)

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, number: int) -> str:
        """The key of a sample."""
        return self.keys[number]

    def number(self, key: str) -> int | None:
        """The number of the sample with this key; None if there is none."""
        return self._numbers.get(key)

    def others(self, number: int) -> list[int]:
        """The numbers of the other samples of the same person, ascending."""
        return [other for other in self._people.get(number, ()) if other != number]

    def with_others(self) -> int:
        """How many samples have another of the same person."""
        return sum(len(people) > 1 for people in self._people.values())

    def people_digest(self) -> str:
        """A digest of who is shown: equal digests mean that `others` returns the same."""
        return hashlib.sha256(repr(self._people).encode()).hexdigest()

    def records(self, numbers: Sequence[int], *, verify: bool = True) -> list[Record | ShardError]:
        """The records of those samples, in that order; for a damaged one, the error.

        verify: compare the bytes of each with its digest. Raises ShardError if a tar is missing.
        """
        # A new reader: a worker process can't share its parent's connections.
        return self._reader().samples_at([self._place(n) for n in numbers], verify=verify)

    def shard_of(self, number: int) -> str:
        """The name of the tar that has the sample."""
        return str(self._tars[number])

    def _place(self, number: int) -> SamplePlace:
        offset, size = self._spans[number].tolist()
        digest = self._digests[number].tobytes()
        sha256 = digest.hex() if any(digest) else ""
        return SamplePlace(self.keys[number], self.shard_of(number), offset, size, sha256)

    def dataset_config(self) -> str:
        """The data set's own configuration, as YAML; "" if it has none."""
        return self._reader().config_text()

    def _reader(self) -> DatasetReader:
        try:
            return DatasetReader(self.data)
        except ConfigError as error:
            raise ConfigError(f"data: {error}") from error


def _places(reader: DatasetReader, manifest: Manifest) -> list[SamplePlace]:
    """Where a shard's samples are, in the order of its tar."""
    tar = manifest.tar
    try:
        size = reader.store.size(layout.in_shards(tar.name))
    except FileNotFoundError:
        raise ShardError(f"{reader}: {tar.name} is missing. {_REBUILD}") from None
    if size != tar.bytes:
        raise ShardError(
            f"{reader}: {tar.name} holds {size:,} bytes, its manifest says {tar.bytes:,}. "
            f"{_REBUILD}"
        )
    if not manifest.written:
        return []
    rows = reader.rows(manifest.index, _COLUMNS, Status.OK).to_pylist()
    rows.sort(key=lambda row: row["tar_offset"])
    places = [
        SamplePlace(r["key"], tar.name, r["tar_offset"], r["tar_size"], r["sample_sha256"] or "")
        for r in rows
    ]
    if len(places) != manifest.written or places[-1].offset + places[-1].size > tar.bytes:
        raise ShardError(
            f"{reader}: {manifest.shard} has {manifest.written} samples, its sidecar places "
            f"{len(places)}. {_REBUILD}"
        )
    return places


def _chosen(places: Iterable[SamplePlace], keys: frozenset[str] | None) -> list[SamplePlace]:
    return [place for place in places if keys is None or place.key in keys]


def _keys_on_side(reader: DatasetReader, split: str) -> frozenset[str]:
    """Raises SourceError where the data set isn't split yet."""
    table = reader.identities(["key", "split"])
    if not len(table):
        raise SourceError(
            f"{reader}: it has no identities.parquet, so it isn't split yet. Run make dataset to "
            "its "
            "end, or train with split=all."
        )
    return frozenset(row["key"] for row in table.to_pylist() if row["split"] == split)


def _people(reader: DatasetReader, numbers: Mapping[str, int]) -> dict[int, list[int]]:
    """Number of a sample → the numbers of all samples of the same person, ascending."""
    people: dict[str, list[int]] = {}
    for row in reader.identities(["key", "identity_id"]).to_pylist():
        if row["key"] in numbers:
            people.setdefault(row["identity_id"], []).append(numbers[row["key"]])
    return {number: sorted(of_one) for of_one in people.values() for number in of_one}


def _digest(manifests: Iterable[Manifest], keys: Iterable[str] | None) -> str:
    text = "".join(f"{manifest.shard} {manifest.tar.sha256}\n" for manifest in manifests)
    text += "" if keys is None else "".join(f"{key}\n" for key in keys)
    return hashlib.sha256(text.encode()).hexdigest()
