"""Plan: which input belongs to which shard, kept for good; and what each shard still needs.

The sorted inputs are cut into shards once. A known input keeps its shard for ever, new ones are cut into new shards
behind; one that has vanished keeps its place. Exact copies are found here, where all inputs are seen at once: sizes
first, then the first 4 KB, then the whole file, so that only likely copies are read.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import ConfigError, SourceError
from configs.schema import DatasetConfig
from pipelines.shards import read_manifest
from pipelines.sources import Input, list_folder, read_bytes
from pipelines.store import Store
from stages.base import Failed

PLAN = "plan.parquet"
_PREFIX = 4096

_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("key", pa.string()),
        ("source", pa.string()),
        ("path", pa.binary()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("duplicate_of", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """A shard to be made. start: index of the first stage to run; over 0, the shard's own samples feed that stage."""

    index: int
    inputs: tuple[Input, ...]
    start: int = 0

    @property
    def digest(self) -> str:
        """Equal digests mean equal inputs (by name, size, time and copies), in equal order."""
        lines = (f"{i.key} {i.size} {i.mtime_ns} {i.duplicate_of}" for i in self.inputs)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """shards: index → inputs. new, changed, vanished: how many inputs, against the plan kept in the output."""

    shards: dict[int, tuple[Input, ...]]
    new: int = 0
    changed: int = 0
    vanished: int = 0

    @property
    def inputs(self) -> int:
        return sum(len(inputs) for inputs in self.shards.values())


def make_plan(config: DatasetConfig, store: Store) -> Plan:
    """List the source and place every input; nothing is written. Raises SourceError if there is none at all."""
    known = read_plan(store)
    exclude = store.root if store.local else ""
    found = {item.key: item for item in _unique(list_folder(config.source, exclude))}
    if not found and not known:
        raise SourceError(
            f"source.path={config.source.path!r} holds no {', '.join(config.source.extensions)} files, at any depth."
        )
    placed = {item.key for inputs in known.values() for item in inputs}
    shards = {index: [_fresh(item, found.get(item.key)) for item in inputs] for index, inputs in sorted(known.items())}
    behind = sorted((item for key, item in found.items() if key not in placed), key=lambda item: item.path)
    for index, batch in enumerate(_batched(behind, config.shard_size), start=max(shards, default=-1) + 1):
        shards[index] = batch
    copies = _copies(config, [item for inputs in shards.values() for item in inputs])
    before = {item.key: item for inputs in known.values() for item in inputs}
    return Plan(
        shards={
            index: tuple(replace(item, duplicate_of=copies.get(item.key, "")) for item in inputs)
            for index, inputs in shards.items()
        },
        new=len(behind),
        changed=sum(1 for key, item in found.items() if key in before and _stamp(item) != _stamp(before[key])),
        vanished=sum(1 for key in before if key not in found),
    )


def pending(plan: Plan, store: Store, signatures: Sequence[str]) -> list[ShardTask]:
    """The shards that aren't committed with these inputs and signatures, and from which stage each must start."""
    tasks = []
    for index, inputs in plan.shards.items():
        task = ShardTask(index=index, inputs=inputs)
        manifest = read_manifest(store, index)
        start = 0 if manifest is None else _first_stale(manifest, task, signatures)
        if start < len(signatures):
            tasks.append(replace(task, start=start))
    return tasks


def _first_stale(manifest: dict[str, Any], task: ShardTask, signatures: Sequence[str]) -> int:
    """Index of the first stage to run again: len(signatures) if none, 0 if from the source."""
    if manifest["inputs_digest"] != task.digest or len(manifest["signatures"]) != len(signatures):
        return 0
    pairs = zip(manifest["signatures"], signatures, strict=True)
    start = next((i for i, (old, new) in enumerate(pairs) if old != new), len(signatures))
    names = [signature.split("-", 1)[0] for signature in signatures]
    ended_later = set(names[start:]) & set(manifest["ended_in"])
    return 0 if ended_later else start  # what ended in a stage that runs again has no picture in the shard


def read_plan(store: Store) -> dict[int, tuple[Input, ...]]:
    """The plan kept in the output, {} if there is none."""
    if not store.exists(PLAN):
        return {}
    with store.open(PLAN) as stream:
        rows = pq.read_table(stream).to_pylist()
    shards: dict[int, list[Input]] = defaultdict(list)
    for row in rows:
        names = ("source", "path", "size", "mtime_ns", "duplicate_of")
        shards[row["shard"]].append(Input(**{name: row[name] for name in names}))
    return {index: tuple(inputs) for index, inputs in shards.items()}


def write_plan(plan: Plan, store: Store) -> None:
    names = ("key", "source", "path", "size", "mtime_ns", "duplicate_of")
    rows = [
        {"shard": index, **{name: getattr(item, name) for name in names}}
        for index, inputs in plan.shards.items()
        for item in inputs
    ]
    with store.writer(PLAN) as stream:
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), stream, compression="zstd")


def _unique(items: Iterable[Input]) -> list[Input]:
    seen: dict[str, Input] = {}
    for item in items:
        if item.key in seen and seen[item.key].path != item.path:
            raise ConfigError(f"two inputs would be called {item.source!r}: rename {item.path!r}")
        seen[item.key] = item
    return list(seen.values())


def _fresh(known: Input, found: Input | None) -> Input:
    return known if found is None else found


def _stamp(item: Input) -> tuple[int, int]:
    return item.size, item.mtime_ns


def _batched(items: list[Input], size: int) -> Iterable[list[Input]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _copies(config: DatasetConfig, items: Sequence[Input]) -> dict[str, str]:
    """key → source of the first input with the very same bytes, for each later one; in the order of `items`."""
    limit = config.resize.max_bytes
    candidates = [[item for item in items if 0 < item.size <= limit]]
    by_size = _split(candidates, lambda item: item.size)
    by_prefix = _split(by_size, lambda item: _digest(config, item, _PREFIX))
    copies = {}
    for group in _split(by_prefix, lambda item: _digest(config, item, limit)):
        copies.update({item.key: group[0].source for item in group[1:]})
    return copies


def _split(groups: Iterable[list[Input]], by: Any) -> list[list[Input]]:
    """Each group cut by `by`, keeping order; groups of one can't hold copies and are left out."""
    kept = []
    for group in groups:
        parts: dict[Any, list[Input]] = defaultdict(list)
        for item in group:
            if (value := by(item)) is not None:
                parts[value].append(item)
        kept += [part for part in parts.values() if len(part) > 1]
    return kept


def _digest(config: DatasetConfig, item: Input, count: int) -> str | None:
    """sha256 of the first `count` bytes; None for an input that can't be read: the run itself will say why."""
    try:
        return hashlib.sha256(read_bytes(config.source.path, item, config.resize.max_bytes, count)).hexdigest()
    except Failed:
        return None
