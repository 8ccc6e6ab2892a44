"""What the report states of a data set's identities (identities.parquet) and removals
(takedown.jsonl)."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.report.distribution import Floats, Sums, distribution_of
from stages.storage.exclusions import read_takedowns
from stages.storage.layout import IDENTITIES
from stages.storage.reader import DatasetReader
from stages.storage.store import Store

_LARGEST: Final = 12  # identities that are listed


def identity_summary(reader: DatasetReader) -> dict[str, Any] | None:
    """Numbers of identities and of samples in them. None where the global pass hasn't run.

    sizes: number of samples → number of identities. splits: samples and identities of each side.
    similarity: distribution of the cosine to the nearest other sample.
    """
    if not reader.store.exists(IDENTITIES):
        return None
    table = reader.identities(["identity_id", "split", "similarity"])
    names, sizes = _counted(table["identity_id"])
    order = sorted(range(len(names)), key=lambda at: (-sizes[at], names[at]))[:_LARGEST]
    splits = Counter(dict(zip(*_counted(table["split"]), strict=True)))
    pairs = table.select(["identity_id", "split"]).group_by(["identity_id", "split"]).aggregate([])
    split_identities = dict(zip(*_counted(pairs["split"]), strict=True))
    nearest = _first_values(table["similarity"])
    sums = Sums(1)
    sums.add(nearest[None])
    return {
        "count": len(names),
        "samples": len(table),
        "sizes": {str(size): count for size, count in sorted(Counter(sizes).items())},
        "largest": [{"identity": names[at], "count": sizes[at]} for at in order],
        "splits": {
            name: {"samples": splits[name], "identities": split_identities[name]}
            for name in sorted(splits)
        },
        "similarity": distribution_of(np.sort(nearest), sums.totals()[0]),
    }


def takedowns(store: Store) -> list[dict[str, Any]]:
    """time, by, inputs, note, and the numbers of shards and keys, for each line of the log."""
    return [
        {name: entry[name] for name in ("time", "by", "inputs", "note")}
        | {"shards": len(entry["removed"]), "keys": sum(map(len, entry["removed"].values()))}
        for entry in read_takedowns(store)
    ]


def identity_rows(reader: DatasetReader, keys: list[str]) -> dict[str, dict[str, Any]]:
    """key → row of identities.parquet, of the keys that have one. Reads one row group at a time."""
    by_key: dict[str, dict[str, Any]] = {}
    if not reader.store.exists(IDENTITIES):
        return by_key
    wanted = pa.array(keys, pa.string())
    with reader.store.parquet(IDENTITIES) as file:
        for group in range(file.num_row_groups):
            matches = pc.is_in(file.read_row_group(group, ["key"])["key"], wanted)
            if pc.any(matches).as_py():
                rows = file.read_row_group(group).filter(matches).to_pylist()
                by_key |= {row["key"]: row for row in rows}
    return by_key


def _first_values(lists: pa.ChunkedArray) -> Floats:
    """The first number of each list that is not empty."""
    filled = lists.filter(pc.greater(pc.list_value_length(lists), 0))
    return np.asarray(pc.cast(pc.list_element(filled, 0), pa.float64()).to_numpy(), np.float64)


def _counted(column: pa.ChunkedArray) -> tuple[list[str], list[int]]:
    """(distinct values, how often each occurs)."""
    pairs = pc.value_counts(column.combine_chunks())
    return pairs.field("values").to_pylist(), pairs.field("counts").to_pylist()
