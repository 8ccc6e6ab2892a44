"""Removal: logs what is removed, removes it from the shards, and releases what was blocked wrongly.

If it is stopped, the same command or the next run completes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow.compute as pc

from configs.errors import PipelineError
from configs.schema import DatasetConfig
from pipelines.chain import Chain, build_chain
from pipelines.dedup.global_pass import (
    apply_exclusions,
    is_global_pass_current,
    run_global_pass,
    stale_shards,
)
from pipelines.takedown.matching import Match, PhotoRequest
from stages.storage import layout
from stages.storage.commit import ChainInfo, complete_commits, remove_uncommitted
from stages.storage.exclusions import BLOCKED, RELEASE, check_log, encode_vectors
from stages.storage.lock import RunLock
from stages.storage.reader import DatasetReader
from stages.storage.store import Store

By = Literal["source", "hash", "photo"]


def take_down(
    store: Store,
    config: DatasetConfig,
    matches: Sequence[Match],
    by: By,
    note: str,
    chain: Chain = build_chain,
    request: PhotoRequest | None = None,
    block: bool = False,
) -> list[str]:
    """Removes `matches` from the data set. Returns the names of the shards that had them.

    by, note: for the log. request: of a request by photograph. block: keep its embeddings, so that
    later pictures of the person are quarantined.
    """
    removed: dict[str, list[str]] = {}
    for match in matches:
        removed.setdefault(layout.shard_name(match.shard), []).append(match.key)
    entry: dict[str, Any] = {
        "time": _now(),
        "by": by,
        "inputs": len(matches),
        "shards": sorted(removed),
        "removed": removed,
        "sha256": sorted({match.sha256 for match in matches} - {""}),
        "note": note,
    }
    if request is not None:
        entry["photo"] = {
            "photos": len(request.vectors),
            "cosine": request.cosine,
            "embedder": request.embedder,
            "weights": request.weights,
        }
        if block:
            entry["block"] = encode_vectors(request.vectors)
    with _completed(store, config, chain):
        _append(store, entry)
    return sorted(removed)


def release(
    store: Store, config: DatasetConfig, key: str, note: str, chain: Chain = build_chain
) -> None:
    """Makes a record a sample again that was quarantined as a picture of a blocked person.

    The people who are blocked now don't match this image any more, under any name. Raises
    PipelineError if the record isn't quarantined for that reason.
    """
    digest = check_blocked(store, key)
    entry = {"time": _now(), "by": RELEASE, "key": key, "released": [digest], "note": note}
    with _completed(store, config, chain):
        _append(store, entry)


def check_blocked(store: Store, key: str) -> str:
    """Returns the sha256 of a record that is quarantined as a picture of a blocked person. Raises
    PipelineError if the record isn't.
    """
    reader = DatasetReader(store)
    for index in reader.manifests():
        table = reader.rows(index, ("key", "sha256", "reason"))
        for row in table.filter(pc.equal(table.column("key"), key)).to_pylist():
            if row["reason"] == BLOCKED and row["sha256"]:
                return str(row["sha256"])
            raise PipelineError(
                f"--release: {key} is {row['reason'] or 'a sample'}; expected one that was dropped "
                f"as {BLOCKED}."
            )
    raise PipelineError(f"--release: no record has the key {key}.")


def is_unfinished(store: Store, config: DatasetConfig) -> bool:
    """Returns whether a take-down or a release was stopped before it had changed all shards, or
    before the report was written again.
    """
    if not store.exists(layout.TAKEDOWNS):
        return False
    if not store.exists(layout.REPORT):
        return True
    return bool(stale_shards(store)) or not is_global_pass_current(store, config.global_pass)


def finish(store: Store, config: DatasetConfig, chain: Chain = build_chain) -> None:
    """Completes a take-down or a release that was stopped."""
    with _completed(store, config, chain):
        pass


@contextmanager
def _completed(store: Store, config: DatasetConfig, chain: Chain) -> Iterator[None]:
    """A context that holds the run lock and, at its end, lets the data set follow the log. The
    report, which shows removed records, is deleted first: the caller writes it again.
    """
    info = ChainInfo.of(chain(config), signed={"embed"})  # of blocked people
    with RunLock(store):
        complete_commits(store)
        check_log(store, DatasetReader(store).manifests().values())
        remove_uncommitted(store)
        yield
        for name in (layout.REPORT, layout.STATS, layout.STATS_TABLE):
            store.remove(name)
        apply_exclusions(store, info)
        run_global_pass(store, config.global_pass, info)


def _append(store: Store, entry: dict[str, Any]) -> None:
    log = store.read(layout.TAKEDOWNS).decode() if store.exists(layout.TAKEDOWNS) else ""
    store.write(layout.TAKEDOWNS, log + json.dumps(entry, ensure_ascii=False) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
