"""Identities: what identities.parquet and takedown.jsonl say of the whole set."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.report.distribution import Sums, spread
from stages.storage.exclusions import read_takedowns
from stages.storage.layout import IDENTITIES
from stages.storage.reader import DatasetReader
from stages.storage.store import Store

_NAMED: Final = 12  # largest identities named one by one


def identity_summary(reader: DatasetReader) -> dict[str, Any] | None:
    """count, samples; sizes: size → number of identities of it; largest; splits; similarity: of
    each sample's nearest other one. None where identities weren't grouped.
    """
    if not reader.store.exists(IDENTITIES):
        return None
    table = reader.identities(["identity_id", "split", "similarity"])
    names, sizes = _counted(table["identity_id"])
    order = sorted(range(len(names)), key=lambda at: (-sizes[at], names[at]))[:_NAMED]
    splits = Counter(dict(zip(*_counted(table["split"]), strict=True)))
    people = table.select(["identity_id", "split"]).group_by(["identity_id", "split"]).aggregate([])
    split_people = dict(zip(*_counted(people["split"]), strict=True))
    closest = _closest(table["similarity"])
    sums = Sums(1)
    sums.add(closest[None])
    return {
        "count": len(names),
        "samples": len(table),
        "sizes": {str(size): count for size, count in sorted(Counter(sizes).items())},
        "largest": [{"identity": names[at], "count": sizes[at]} for at in order],
        "splits": {
            name: {"samples": splits[name], "identities": split_people[name]}
            for name in sorted(splits)
        },
        "similarity": spread(np.sort(closest), sums.totals()[0]),
    }


def takedowns(store: Store) -> list[dict[str, Any]]:
    """Every line of the log, without what it removed: time, by, inputs, note, shards, keys (the
    last two: how many).
    """
    return [
        {name: entry[name] for name in ("time", "by", "inputs", "note")}
        | {"shards": len(entry["removed"]), "keys": sum(map(len, entry["removed"].values()))}
        for entry in read_takedowns(store)
    ]


def neighbours(reader: DatasetReader, keys: list[str]) -> dict[str, dict[str, Any]]:
    """key → its row of identities.parquet, of those that are in it; a row group at a time."""
    by_key: dict[str, dict[str, Any]] = {}
    if not reader.store.exists(IDENTITIES):
        return by_key
    wanted = pa.array(keys, pa.string())
    with reader.store.parquet(IDENTITIES) as file:
        for group in range(file.num_row_groups):
            here = pc.is_in(file.read_row_group(group, ["key"])["key"], wanted)
            if pc.any(here).as_py():
                rows = file.read_row_group(group).filter(here).to_pylist()
                by_key |= {row["key"]: row for row in rows}
    return by_key


def _closest(lists: pa.ChunkedArray) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The first of each list that has one."""
    some = lists.filter(pc.greater(pc.list_value_length(lists), 0))
    return np.asarray(pc.cast(pc.list_element(some, 0), pa.float64()).to_numpy(), np.float64)


def _counted(column: pa.ChunkedArray) -> tuple[list[str], list[int]]:
    pairs = pc.value_counts(column.combine_chunks())
    return pairs.field("values").to_pylist(), pairs.field("counts").to_pylist()
