"""Global pass: blocked people, cross-shard deduplication, identity clustering, train/val split.

It reads all sidecars, compares all samples with blocked people and with each other
(pipelines/dedup), writes duplicates.parquet, and rewrites the shards concerned. Then it writes the
identities and the split of the other samples to identities.parquet, with a digest of all that the
result depends on: a second pass over the same data does nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import ShardError
from configs.quality import GlobalPassConfig
from pipelines.dedup import (
    Duplicate,
    Neighbours,
    cluster,
    find_duplicates,
    near_by_identity,
    split_of,
)
from pipelines.dedup.blocked import blocked_rows, comparable, embedder_of
from pipelines.dedup.faces import FACE_COLUMNS
from pipelines.dedup.nearest import Vectors
from stages.record import IDENTITY_DIM, KEY_LENGTH, Status
from stages.storage import exclusions, layout
from stages.storage.commit import ChainInfo, commit_exclusions
from stages.storage.exclusions import DUPLICATES_SCHEMA, GLOBAL_PASS, encode_vectors
from stages.storage.manifest import Manifest
from stages.storage.reader import IDENTITIES_SCHEMA, DatasetReader
from stages.storage.store import Store

logger = logging.getLogger(__name__)

_VERSION: Final = 1  # raise it if the same samples give another result
_DIGEST: Final = b"made_from"  # metadata of identities.parquet; see _input_digest
_SPLIT: Final = b"split"
_NEAREST: Final = 5  # neighbours of each sample that are stored for the report
_MIN_SIMILARITY: Final = 0.2  # least cosine of stored neighbours
_HASH_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Pool:
    """The N samples to compare, in the plan's order.

    vectors: (N, 512) float32, unit norm, a memory map. hashes: (N, 32) uint8. people: the person
    of each, as the source states it; "": it doesn't.
    """

    keys: list[str]
    sources: list[str]
    shards: list[int]
    sha256: list[str]
    hashes: Any
    vectors: Any
    people: list[str]


def run_global_pass(store: Store, config: GlobalPassConfig, chain: ChainInfo) -> None:
    """Finds and quarantines duplicates, and writes identities and split of the other samples.

    Call it while holding the run lock. If it is stopped, the next call gives the same result.
    """
    if is_global_pass_current(store, config):
        return
    rewritten = apply_exclusions(store, chain)  # first, so that removed samples aren't compared
    blocked = _blocked(store, chain)
    pool = read_pool(store, frozenset(row["key"] for row in blocked))
    duplicates = find_duplicates(
        pool.sha256, pool.hashes, pool.vectors, config.max_hash_distance, config.max_similarity
    )
    store.write_table_if_changed(layout.DUPLICATES, _duplicates(pool, duplicates, blocked))
    rewritten += apply_exclusions(store, chain)
    by_reason = Counter(duplicate.reason for duplicate in duplicates.values())
    by_reason |= Counter(row["reason"] for row in blocked)
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(by_reason.items()))
    logger.info(
        "%s samples compared: %s%s",
        f"{len(pool.keys) + len(blocked):,}",
        reasons or "no duplicates",
        f"; {rewritten} shards rewritten" if rewritten else "",
    )
    dropped = np.fromiter(duplicates, np.int64, len(duplicates))
    table = _identities(pool, np.setdiff1d(np.arange(len(pool.keys)), dropped), config)
    people = len(table.column("identity_id").unique())
    logger.info("%s identities among %s samples", f"{people:,}", f"{len(table):,}")
    split = json.dumps({"val_share": config.val_share, "seed": config.seed})
    metadata = {_DIGEST: _input_digest(store, config).encode(), _SPLIT: split.encode()}
    store.write_table_if_changed(layout.IDENTITIES, table.replace_schema_metadata(metadata))


def is_global_pass_current(store: Store, config: GlobalPassConfig) -> bool:
    """Returns whether all shards have their exclusions applied, both tables are there, and the
    identities are those of these shards and this configuration.
    """
    tables = (layout.DUPLICATES, layout.IDENTITIES)
    if stale_shards(store) or not all(map(store.exists, tables)):
        return False
    try:
        with store.parquet(layout.IDENTITIES) as file:
            metadata = file.schema_arrow.metadata or {}
    except ShardError:
        logger.warning("%s is damaged; it is made again", layout.IDENTITIES)
        return False
    return metadata.get(_DIGEST) == _input_digest(store, config).encode()


def apply_exclusions(store: Store, chain: ChainInfo) -> int:
    """Rewrites the shards whose exclusions have changed. Returns their number."""
    stale = stale_shards(store)
    for manifest in stale:
        commit_exclusions(store, manifest, chain)
    return len(stale)


def stale_shards(store: Store, manifests: Iterable[Manifest] | None = None) -> list[Manifest]:
    """Returns the manifests of the shards whose exclusions have changed since their commit.

    manifests: of all shards, if the caller has read them.
    """
    excluded = exclusions.of_all(store)
    if manifests is None:
        manifests = DatasetReader(store).manifests().values()
    return [
        manifest
        for manifest in manifests
        if manifest.exclusions != exclusions.digest(excluded.get(manifest.index, {}))
    ]


def read_pool(store: Store, without: frozenset[str] = frozenset()) -> Pool:
    """Returns all written samples, and those that this pass quarantined before. without: keys of
    samples to leave out.
    """
    reader = DatasetReader(store)
    names = ("key", "source", "sha256", "hash", "person")
    columns = {name: list[Any]() for name in (*names, "shard")}
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the memory map keeps it open
    for index in reader.manifests():
        table = rows_to_compare(reader, index, ("person",))
        if without:
            mask = [key not in without for key in table.column("key").to_pylist()]
            table = table.filter(pa.array(mask, pa.bool_()))
        for name in names:
            columns[name] += table.column(name).to_pylist()
        columns["shard"] += [index] * len(table)
        vectors = table.column("identity").combine_chunks().flatten()
        file.write(vectors.to_numpy(zero_copy_only=False).astype(np.float32).tobytes())
    file.flush()
    count = len(columns["key"])
    vectors = np.zeros((0, IDENTITY_DIM), np.float32)
    if count:
        vectors = np.memmap(file, np.float32, "r", shape=(count, IDENTITY_DIM))
    hashes = [bytes.fromhex(v) if v else bytes(_HASH_BYTES) for v in columns["hash"]]
    return Pool(
        keys=columns["key"],
        sources=columns["source"],
        shards=columns["shard"],
        sha256=columns["sha256"],
        hashes=np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, _HASH_BYTES),
        vectors=vectors,
        # null where an older program wrote the shard
        people=[person or "" for person in columns["person"]],
    )


def _blocked(store: Store, chain: ChainInfo) -> list[dict[str, Any]]:
    """Returns the rows of duplicates.parquet for samples that show a blocked person."""
    people = exclusions.blocked_people(store)
    people = comparable(people, embedder_of(chain.signatures))
    reader = DatasetReader(store)
    return [
        {"shard": index, **row}
        for index in (reader.manifests() if people else ())
        for row in blocked_rows(rows_to_compare(reader, index, FACE_COLUMNS), people)
    ]


def rows_to_compare(reader: DatasetReader, index: int, columns: Sequence[str] = ()) -> pa.Table:
    """Returns the rows of a shard's written samples and of those that this pass quarantined.

    columns: besides those that all comparisons read.
    """
    names = ("key", "source", "sha256", "hash", "identity", "status", "stage", "quarantine_offset")
    table = reader.rows(index, [*names, *(name for name in columns if name not in names)])
    quarantined = pc.greater_equal(table.column("quarantine_offset"), 0)
    duplicate = pc.and_(pc.equal(table.column("stage"), GLOBAL_PASS), quarantined)
    return table.filter(pc.or_(pc.equal(table.column("status"), Status.OK.value), duplicate))


def lint_identities(store: Store, samples: Set[str], complete: bool) -> Iterator[str]:
    """Yields a line for each contradiction between identities, split and samples.

    samples: keys of the written samples. complete: they are those of all shards.
    """
    table = DatasetReader(store).identities()
    if not len(table):
        return
    rows = table.select(["key", "identity_id", "split_group", "split"]).to_pylist()
    counts = Counter(row["key"] for row in rows)
    keys = {*counts}
    for problem, affected in (
        ("has more than one row", {key for key, count in counts.items() if count > 1}),
        ("is not a sample", keys - samples if complete else set()),
        ("is a sample without a row", samples - keys),
    ):
        if affected:
            more = f", and {len(affected) - 1} more" if len(affected) > 1 else ""
            yield f"{layout.IDENTITIES}: {min(affected)} {problem}{more}"
    split = json.loads(table.schema.metadata[_SPLIT])
    for column in ("identity_id", "split_group"):
        sides: dict[str, set[str]] = {}
        for row in rows:
            sides.setdefault(row[column], set()).add(row["split"])
        for name, names in sides.items():
            if len(names) > 1:
                yield f"{layout.IDENTITIES}: {name} is on both sides of the split"
            elif column == "split_group":
                side = split_of(name, split["val_share"], split["seed"])
                if names != {side}:
                    yield f"{layout.IDENTITIES}: {name} is on the wrong side of the split"


def _duplicates(
    pool: Pool, duplicates: Mapping[int, Duplicate], blocked: Sequence[dict[str, Any]]
) -> pa.Table:
    """Returns duplicates.parquet. duplicates: row of the pool → what it duplicates. blocked: rows
    of samples outside the pool.
    """

    def detail(duplicate: Duplicate) -> str:
        other = pool.sources[duplicate.of]
        if duplicate.reason == "duplicate":
            return f"same bytes as {other}"
        if duplicate.reason == "near_duplicate":
            return f"{duplicate.metric:.0f} of 256 bits of its hash differ from {other}"
        return f"cosine {duplicate.metric:.4f} to {other}"

    rows = [
        {
            "shard": pool.shards[row],
            "key": pool.keys[row],
            "reason": duplicate.reason,
            "of": pool.keys[duplicate.of],
            "value": duplicate.metric,
            "detail": detail(duplicate),
        }
        for row, duplicate in sorted(duplicates.items())
    ]
    return pa.Table.from_pylist([*rows, *blocked], schema=DUPLICATES_SCHEMA)


def _identities(pool: Pool, rows: Any, config: GlobalPassConfig) -> pa.Table:
    """Returns identities.parquet. rows: those of the pool that are not duplicates."""
    vectors = pool.vectors[rows] if len(rows) < len(pool.keys) else pool.vectors
    near = near_identities(vectors, config)
    keys = [pool.keys[row] for row in rows]
    names, groups = named_identities(
        keys, [pool.people[row] for row in rows], vectors, near, config
    )
    sizes = Counter(names)
    sides = {group: split_of(group, config.val_share, config.seed) for group in set(groups)}
    closest = [[place for place in row if place >= 0][:_NEAREST] for row in near.row.tolist()]
    columns = {
        "key": keys,
        "shard": [pool.shards[row] for row in rows],
        "identity_id": names,
        "identity_size": [sizes[name] for name in names],
        "split_group": groups,
        "split": [sides[group] for group in groups],
        "nearest": [[keys[place] for place in places] for places in closest],
        "similarity": [
            row[: len(places)]
            for row, places in zip(near.similarity.tolist(), closest, strict=True)
        ],
    }
    return pa.table(columns, schema=IDENTITIES_SCHEMA)


def near_identities(vectors: Vectors, config: GlobalPassConfig) -> Neighbours:
    least = min(_MIN_SIMILARITY, config.split_similarity)
    return near_by_identity(vectors, least, config.nearest)


def named_identities(
    keys: Sequence[str],
    people: Sequence[str],
    vectors: Vectors,
    near: Neighbours,
    config: GlobalPassConfig,
) -> tuple[list[str], list[str]]:
    """Returns the identity and the split group of each sample. near: of `vectors`.

    A person whom the source states is an identity and a group. Its name is a digest of the text, so
    it depends on no sample. The other samples are clustered, among themselves only.
    """
    names = [f"person-{_digest_of(person)}" if person else "" for person in people]
    groups = [*names]
    rows = np.flatnonzero([not person for person in people])
    if len(rows) < len(people):
        vectors = vectors[rows]
        near = near_identities(vectors, config)  # in `near`, samples with a person take up places
    labels = cluster(vectors, near, config.identity_similarity)
    # All samples of an identity get the group of its earliest member, so that it is in one group.
    group_labels = cluster(vectors, near, config.split_similarity)[labels]
    for row, label, group in zip(rows, rows[labels], rows[group_labels], strict=True):
        names[row] = f"id-{keys[label][:12]}"
        groups[row] = f"group-{keys[group][:12]}"
    return names, groups


def _digest_of(person: str) -> str:
    return hashlib.sha256(person.encode()).hexdigest()[:KEY_LENGTH]


def _input_digest(store: Store, config: GlobalPassConfig) -> str:
    """Returns a digest of all that the result depends on: the settings, all sidecars, and the
    people who are blocked, if there are any.
    """
    manifests = DatasetReader(store).manifests()
    sidecars = [(index, manifest.sidecar.sha256) for index, manifest in manifests.items()]
    blocked = [
        [encode_vectors(person.vectors), person.cosine, person.embedder, sorted(person.released)]
        for person in exclusions.blocked_people(store)
    ]
    inputs = [_VERSION, asdict(config), sidecars, *([blocked] if blocked else [])]
    text = json.dumps(inputs, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
