"""Proof: checks that nothing of removed records is left, and says what that proves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from pipelines.dedup.blocked import blocked_rows, embedder_of
from pipelines.dedup.faces import FACE_COLUMNS
from stages.record import EMBEDDINGS, Status
from stages.storage import exclusions, layout
from stages.storage.exclusions import TAKEN_DOWN
from stages.storage.reader import DatasetReader
from stages.storage.samples import member_names
from stages.storage.store import Store

_PERSONAL: Final = ("source", "sha256", "thumbnail", *EMBEDDINGS, "caption")


def lint_removals(store: Store) -> Iterator[str]:
    """Yields a line for each trace of a removed record that is still in the data set, and for each
    sample that shows a blocked person.
    """
    reader = DatasetReader(store)
    yield from _blocked_samples(reader)
    keys = exclusions.removed_keys(store)
    if not keys:
        return
    yield from _rows_left(reader, keys)
    for name in store.names(layout.SHARDS):
        if name.endswith(".tar"):
            with store.open(layout.in_shards(name)) as tar:
                members = [m for m in member_names(tar) if m.partition(".")[0] in keys]
            for member in members:
                yield f"{name}: {member} was taken down, but is still in the tar"
    for row in reader.identities(["key", "nearest"]).to_pylist():
        if keys & {row["key"], *row["nearest"]}:
            yield f"{layout.IDENTITIES}: the row of {row['key']} has a key that was taken down"


def _rows_left(reader: DatasetReader, keys: frozenset[str]) -> Iterator[str]:
    """Yields a line for each sidecar row with data of a removed record."""
    digests = exclusions.removed_digests(reader.store)
    columns = ("key", "reason", *_PERSONAL, "tar_offset", "quarantine_offset")
    for index, manifest in reader.manifests().items():
        for row in reader.rows(index, columns).to_pylist():
            in_tar = max(row["tar_offset"], row["quarantine_offset"]) >= 0
            personal = in_tar or any(row[name] for name in _PERSONAL)
            if row["sha256"] in digests:
                yield f"{manifest.shard}: {row['key']} has the digest of a removed image"
            elif row["key"] in keys and (personal or row["reason"] != TAKEN_DOWN):
                yield f"{manifest.shard}: {row['key']} was taken down, but its row still has data"


def _blocked_samples(reader: DatasetReader) -> Iterator[str]:
    """Yields a line for each written sample in which a face matches a blocked person."""
    people = exclusions.blocked_people(reader.store)
    for index, manifest in reader.manifests().items() if people else ():
        embedder = embedder_of(manifest.signatures)
        same = [person for person in people if person.embedder == embedder]
        table = reader.rows(index, ("key", "sha256", *FACE_COLUMNS), Status.OK)
        for row in blocked_rows(table, same):
            yield (
                f"{manifest.shard}: {row['key']} is a sample, but shows a blocked person "
                f"({row['detail']}). Run the pipeline again."
            )


def statements(store: Store) -> Iterator[str]:
    """Yields lines that say what it proves about removal requests if `lint` found no fault; none if
    there was no request.
    """
    entries = exclusions.read_takedowns(store)
    if not entries:
        return
    keys, digests = exclusions.removed_keys(store), exclusions.removed_digests(store)
    yield (
        f"removals: {_count(len(entries), 'request')}. No tar, sidecar or {layout.IDENTITIES} has "
        f"data of the {_count(len(keys), 'removed key')}, or one of the "
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
    embedders = {embedder_of(m.signatures) for m in DatasetReader(store).manifests().values()}
    same = [person for person in people if embedders <= {person.embedder}]
    if same:
        least = min(person.cosine for person in same)
        yield (
            f"removals: blocked people: {len(same)}. No face of a sample has a cosine of at least "
            f"{least:.2f} to one of them" + _released(people)
        )
    if others := len(people) - len(same):
        yield (
            f"removals: blocked people that were not compared: {others}. Shards have the faces of "
            "another embedder. Give the photographs to `takedown --photo --block-person` again"
        )


def _released(people: list[exclusions.BlockedPerson]) -> str:
    released = len({digest for person in people for digest in person.released})
    return f", without {_count(released, 'released image')}" if released else ""


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"
