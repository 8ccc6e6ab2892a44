"""Settle: what only the whole data set can tell: copies across shards, identities, and the split.

It reads the sidecars, compares every sample with every other (pipelines/neighbours), writes
`duplicates.parquet`, and has the shards that this concerns carry it out. What is left is given
identities and sides of the split, in `identities.parquet`, which is written last: it holds a digest
of all it was made from, so a second run does nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs.quality import NeighboursConfig
from pipelines.dedup import Duplicate, cluster, find_duplicates, near_by_identity, split_of
from stages.record import IDENTITY_DIM, Status
from stages.storage import exclusions
from stages.storage.commit import Manifest, commit_again, read_manifests, read_sidecar
from stages.storage.exclusions import DUPLICATES, DUPLICATES_SCHEMA, IDENTITIES, NEIGHBOURS_STAGE
from stages.storage.store import Store

logger = logging.getLogger(__name__)

_VERSION: Final = 1  # raise it where the same samples would be settled otherwise
_MADE_FROM: Final = b"made_from"
_SPLIT: Final = b"split"
_NEAREST: Final = 5  # kept of each sample, for the report
_LEAST_ALIKE: Final = 0.2  # cosine from which a neighbour is worth keeping
_HASH_BYTES: Final = 32

IDENTITIES_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.int32()),
        ("identity_id", pa.string()),  # "id-" and the beginning of the key of its earliest member
        ("identity_size", pa.int32()),
        # what is on one side together: identities that may be one person
        ("split_group", pa.string()),
        ("split", pa.string()),  # train or val
        ("nearest", pa.list_(pa.string())),  # keys of other samples, the closest first
        ("similarity", pa.list_(pa.float32())),  # their cosines
    ]
)


@dataclass(frozen=True, slots=True)
class Pool:
    """Samples in the plan's order, N of them. vectors: (N, 512) unit norm, a memory map. hashes:
    (N, 32) uint8.
    """

    keys: list[str]
    sources: list[str]
    shards: list[int]
    sha256: list[str]
    hashes: Any
    vectors: Any


def run_global_pass(store: Store, config: NeighboursConfig) -> None:
    """Find copies, have them held, and give identities and a split to the samples that stay.

    Killed at any point, the next call comes to the same end. Call it while holding the run lock.
    """
    if is_global_pass_current(store, config):
        return
    count = apply_exclusions(store)  # what was taken down must not be compared any more
    pool = read_pool(store)
    copies = find_duplicates(
        pool.sha256, pool.hashes, pool.vectors, config.max_hash_distance, config.max_similarity
    )
    _keep(store, DUPLICATES, _duplicates(pool, copies))
    count += apply_exclusions(store)
    reasons = ", ".join(
        f"{reason} {n}" for reason, n in sorted(Counter(t.reason for t in copies.values()).items())
    )
    again = f"; {count} shards written again" if count else ""
    logger.info("%s samples compared: %s%s", f"{len(pool.keys):,}", reasons or "no copies", again)
    stay = np.setdiff1d(np.arange(len(pool.keys)), np.fromiter(copies, np.int64, len(copies)))
    table = _identities(pool, stay, config)
    people = len(table.column("identity_id").unique())
    logger.info("%s identities among %s samples", f"{people:,}", f"{len(stay):,}")
    split = json.dumps({"val_share": config.val_share, "seed": config.seed})
    told = {_MADE_FROM: _made_from(store, config).encode(), _SPLIT: split.encode()}
    _keep(store, IDENTITIES, table.replace_schema_metadata(told))


def is_global_pass_current(store: Store, config: NeighboursConfig) -> bool:
    """True if every shard carries the verdicts on it, and the identities were made from them by
    this configuration.
    """
    if stale_shards(store) or not store.exists(IDENTITIES):
        return False
    with store.parquet(IDENTITIES) as file:
        told = file.schema_arrow.metadata or {}
    return told.get(_MADE_FROM) == _made_from(store, config).encode()


def apply_exclusions(store: Store) -> int:
    """Write those shards again that don't carry the verdicts on them yet; how many there were."""
    stale = stale_shards(store)
    for manifest in stale:
        commit_again(store, manifest)
    return len(stale)


def stale_shards(store: Store) -> list[Manifest]:
    """Manifests of the shards that don't carry the verdicts on them yet: copies and take-downs."""
    told = exclusions.of_all(store)
    return [
        manifest
        for index, manifest in read_manifests(store).items()
        if manifest["verdicts"] != exclusions.digest(told.get(index, exclusions.NONE))
    ]


def read_pool(store: Store) -> Pool:
    """Every sample, and those that are held as copies: all that rules let pass."""
    parts = [_part(index, table) for index, table in _sidecars(store)]
    count = sum(len(part["key"]) for part in parts)
    file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the map
    vectors = np.memmap(file, np.float32, "w+", shape=(max(count, 1), IDENTITY_DIM))[:count]
    start = 0
    for (_, table), part in zip(_sidecars(store, ["identity"]), parts, strict=True):
        values = table.column("identity").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        vectors[start : start + len(part["key"])] = values.reshape(-1, IDENTITY_DIM)
        start += len(part["key"])
    hashes = [
        bytes.fromhex(value) if value else bytes(_HASH_BYTES)
        for part in parts
        for value in part["hash"]
    ]
    return Pool(
        **{
            f"{name}s": [value for part in parts for value in part[name]]
            for name in ("key", "source", "shard")
        },
        sha256=[value for part in parts for value in part["sha256"]],
        hashes=np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, _HASH_BYTES),
        vectors=vectors,
    )


def read_identities(store: Store) -> pa.Table:
    """The table, empty where there is none yet."""
    if not store.exists(IDENTITIES):
        return IDENTITIES_SCHEMA.empty_table()
    return store.table(IDENTITIES)


def lint_identities(store: Store) -> Iterator[str]:
    """Every contradiction between the identities, the split and the samples, as a line for people."""
    table = read_identities(store)
    if not len(table):
        return
    rows = table.select(["key", "identity_id", "split_group", "split"]).to_pylist()
    keys = Counter(row["key"] for row in rows)
    samples = set().union(*(_keys(store, index) for index in read_manifests(store)))
    for what, odd in (
        ("has a row twice", {key for key, count in keys.items() if count > 1}),
        ("is no sample", {*keys} - samples),
        ("is a sample and has no row", samples - {*keys}),
    ):
        if odd:
            yield f"{IDENTITIES}: {min(odd)} {what}" + (
                f", as {len(odd) - 1} more" if len(odd) > 1 else ""
            )
    how = json.loads(table.schema.metadata[_SPLIT])
    for column in ("identity_id", "split_group"):
        sides: dict[str, set[str]] = {}
        for row in rows:
            sides.setdefault(row[column], set()).add(row["split"])
        for name, found in sides.items():
            if len(found) > 1:
                yield f"{IDENTITIES}: {name} is on both sides of the split"
            elif column == "split_group" and found != {
                split_of(name, how["val_share"], how["seed"])
            }:
                yield f"{IDENTITIES}: {name} is on the wrong side of the split"


def _keys(store: Store, index: int) -> set[str]:
    table = read_sidecar(store, index, ["key", "status"])
    return {
        *table.filter(pc.equal(table.column("status"), Status.OK.value)).column("key").to_pylist()
    }


def _sidecars(store: Store, columns: list[str] | None = None) -> Iterator[tuple[int, pa.Table]]:
    """Each shard's rows of samples and of copies that are held."""
    wanted = columns or ["key", "source", "sha256", "hash"]
    for index in read_manifests(store):
        table = read_sidecar(store, index, [*wanted, "status", "stage", "held_offset"])
        held = pc.and_(
            pc.equal(table.column("stage"), NEIGHBOURS_STAGE),
            pc.greater_equal(table.column("held_offset"), 0),
        )
        yield (
            index,
            table.filter(pc.or_(pc.equal(table.column("status"), Status.OK.value), held)).select(
                wanted
            ),
        )


def _part(index: int, table: pa.Table) -> dict[str, list[Any]]:
    return {**table.to_pydict(), "shard": [index] * len(table)}


def _duplicates(pool: Pool, copies: Mapping[int, Duplicate]) -> pa.Table:
    def detail(twin: Duplicate) -> str:
        other = pool.sources[twin.of]
        if twin.reason == "duplicate":
            return f"same bytes as {other}"
        if twin.reason == "near_duplicate":
            return f"{twin.metric:.0f} of 256 bits of its hash differ from {other}"
        return f"cosine {twin.metric:.4f} to {other}"

    rows = [
        {
            "shard": pool.shards[row],
            "key": pool.keys[row],
            "reason": twin.reason,
            "of": pool.keys[twin.of],
            "figure": twin.metric,
            "detail": detail(twin),
        }
        for row, twin in sorted(copies.items())
    ]
    return pa.Table.from_pylist(rows, schema=DUPLICATES_SCHEMA)


def _identities(pool: Pool, stay: Any, config: NeighboursConfig) -> pa.Table:
    """A row for each of the samples `stay`."""
    vectors = pool.vectors[stay] if len(stay) < len(pool.keys) else pool.vectors
    near = near_by_identity(vectors, min(_LEAST_ALIKE, config.split_similarity), config.nearest)
    labels = cluster(vectors, near, config.identity_similarity)
    # The rows of an identity take its earliest member's group: no identity can be in two.
    together = cluster(vectors, near, config.split_similarity)[labels]
    keys = [pool.keys[row] for row in stay]
    names = [f"id-{keys[label][:12]}" for label in labels]
    groups = [f"group-{keys[label][:12]}" for label in together]
    sizes = Counter(names)
    sides = {group: split_of(group, config.val_share, config.seed) for group in set(groups)}
    closest = [[place for place in row if place >= 0][:_NEAREST] for row in near.row.tolist()]
    columns = {
        "key": keys,
        "shard": [pool.shards[row] for row in stay],
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


def _made_from(store: Store, config: NeighboursConfig) -> str:
    """A digest of the settings and of every sidecar."""
    sidecars = [
        (index, found["files"]["parquet"]["sha256"])
        for index, found in read_manifests(store).items()
    ]
    text = json.dumps([_VERSION, asdict(config), sidecars], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _keep(store: Store, name: str, table: pa.Table) -> None:
    """Write a table unless the very same is there already."""
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    if store.read_all([name]).get(name) != out.getvalue():
        with store.writer(name) as stream:
            stream.write(out.getvalue())
