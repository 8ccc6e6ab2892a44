"""Proof: checks that nothing of removed records is left, and says what that proves."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dedup.blocked import blocked_rows, embedder_of
from pipelines.dedup.faces import FACE_COLUMNS
from stages.record import EMBEDDINGS, PROVENANCE, Status
from stages.storage import exclusions, layout
from stages.storage.exclusions import TAKEN_DOWN, BlockedPerson
from stages.storage.manifest import Manifest
from stages.storage.reader import DatasetReader
from stages.storage.sidecar import SidecarFile
from stages.storage.store import Store

_PERSONAL: Final = ("source", "sha256", *PROVENANCE, "thumbnail", *EMBEDDINGS, "caption")


@dataclass(frozen=True, slots=True)
class Removals:
    """Keys and digests of all removed images, and the people who are blocked."""

    keys: frozenset[str] = frozenset()
    digests: frozenset[str] = frozenset()
    people: tuple[BlockedPerson, ...] = ()

    @staticmethod
    def of(store: Store) -> Removals:
        """Reads the removal log."""
        return Removals(
            exclusions.removed_keys(store),
            exclusions.removed_digests(store),
            tuple(exclusions.blocked_people(store)),
        )

    def rows_left(self, manifest: Manifest, sidecar: SidecarFile) -> Iterator[str]:
        """Yields a line for each row of a sidecar with data of a removed image, and for each sample
        that shows a blocked person.
        """
        yield from self._removed_rows(manifest.shard, sidecar)
        embedder = embedder_of(manifest.signatures)
        people = [person for person in self.people if person.embedder == embedder]
        if not people:
            return
        table = sidecar.read(("key", "sha256", "status", *FACE_COLUMNS))
        samples = table.filter(pc.equal(table.column("status"), Status.OK.value))
        for row in blocked_rows(samples, people):
            yield (
                f"{manifest.shard}: {row['key']} is a sample, but shows a blocked person "
                f"({row['detail']}). Run the pipeline again."
            )

    def _removed_rows(self, shard: str, sidecar: SidecarFile) -> Iterator[str]:
        if not self.keys:
            return
        table = sidecar.read(("key", "reason", *_PERSONAL, "tar_offset", "quarantine_offset"))
        by_key = pc.is_in(table.column("key"), pa.array(self.keys, pa.string()))
        by_digest = pc.is_in(table.column("sha256"), pa.array(self.digests, pa.string()))
        for row in table.filter(pc.or_(by_key, by_digest)).to_pylist():
            in_tar = max(row["tar_offset"], row["quarantine_offset"]) >= 0
            personal = in_tar or any(row[name] for name in _PERSONAL)
            if row["sha256"] in self.digests:
                yield f"{shard}: {row['key']} has the digest of a removed image"
            elif personal or row["reason"] != TAKEN_DOWN:
                yield f"{shard}: {row['key']} was taken down, but its row still has data"


def lint_removals(store: Store, keys: Set[str]) -> Iterator[str]:
    """Yields a line for each row of identities.parquet with a removed key."""
    if not keys:
        return
    for row in DatasetReader(store).identities(["key", "nearest"]).to_pylist():
        if keys & {row["key"], *row["nearest"]}:
            yield f"{layout.IDENTITIES}: the row of {row['key']} has a key that was taken down"


def statements(store: Store) -> Iterator[str]:
    """Yields lines that say what it proves about removal requests if `lint` found no fault; none if
    there was no request.
    """
    entries = exclusions.read_takedowns(store)
    if not entries:
        return
    keys, digests = exclusions.removed_keys(store), exclusions.removed_digests(store)
    yield (
        f"removals: {_count(len(entries), 'request')}. No tar, sidecar, features or "
        f"{layout.IDENTITIES} has data of the {_count(len(keys), 'removed key')}, or one of the "
        f"{_count(len(digests), 'removed digest')}"
    )
    for entry in entries:
        if entry["by"] == "photo":
            yield f"removals: {entry['time']}, by photograph: {_of_photo(entry)}"
    yield from _of_blocked(store)


def _of_photo(entry: dict[str, Any]) -> str:
    photo = entry.get("photo")
    if photo is None:  # of an older program
        return (
            "pictures whose main face was alike then were removed; the threshold is not known, and "
            "other faces were not compared"
        )
    photos = _count(photo["photos"], "photograph")
    embedder = photo["weights"] or photo["embedder"]
    return (
        f"pictures in which a face had a cosine of at least {photo['cosine']:.2f} ({embedder}) to "
        f"one of {photos} then were removed"
        + ("" if "block" in entry else "; pictures that came later were not compared")
    )


def _of_blocked(store: Store) -> Iterator[str]:
    people = exclusions.blocked_people(store)
    reader = DatasetReader(store)
    embedders = {embedder_of(manifest.signatures) for manifest in reader.manifests().values()}
    same = [person for person in people if embedders <= {person.embedder}]
    if same:
        least = min(person.cosine for person in same)
        yield (
            f"removals: blocked people: {len(same)}. No face of a sample has a cosine of at least "
            f"{least:.2f} to one of them" + _released(people)
        )
        if foreign := sum(map(partial(_foreign, reader), reader.manifests())):
            yield (
                f"removals: {_count(foreign, 'sample')} brought the embedding of the main face "
                "along. If another network made it, that face was not compared"
            )
    if others := len(people) - len(same):
        yield (
            f"removals: blocked people that were not compared: {others}. Shards have the faces of "
            "another embedder. Give the photographs to `takedown --photo --block-person` again"
        )


def _foreign(reader: DatasetReader, shard: int) -> int:
    """Returns the number of a shard's samples whose embedding came with the source."""
    table = reader.rows(shard, ("status", "identity_norm"))
    samples = table.filter(pc.equal(table.column("status"), Status.OK.value))
    return int(samples.column("identity_norm").null_count)


def _released(people: list[exclusions.BlockedPerson]) -> str:
    released = len({digest for person in people for digest in person.released})
    return f", without {_count(released, 'released image')}" if released else ""


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"
