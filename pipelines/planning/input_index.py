"""InputIndex: sorts and compares the inputs of a source in a temporary SQLite file.

Its memory use doesn't grow with the number of inputs, which may be millions.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from configs.errors import ConfigError
from pipelines.sources import Input

# Column of plan.parquet and of the index → attribute of Input. The column of the provenance keeps
# its first name, `facts`, so that existing plans can be read.
_ATTRIBUTE_BY_COLUMN: Final = {
    "source": "source",
    "locator": "locator",
    "size": "size",
    "version": "version",
    "facts": "provenance",
    "duplicate_of": "duplicate_of",
}
COLUMNS: Final = ("key", *_ATTRIBUTE_BY_COLUMN)  # of plan.parquet, except `shard`
_TABLE: Final = """
CREATE TABLE inputs (
    key TEXT PRIMARY KEY, source TEXT, locator BLOB, size INTEGER, version TEXT, facts TEXT,
    duplicate_of TEXT NOT NULL DEFAULT '', shard INTEGER, position INTEGER,
    -- vanished: in the previous plan and not listed (yet); unchanged, changed: in the previous plan
    -- and listed; new: listed only
    state TEXT
) WITHOUT ROWID
"""


def input_from_row(row: Mapping[str, Any]) -> Input:
    """Returns the Input that a row of plan.parquet describes."""
    values = {name: row[column] for column, name in _ATTRIBUTE_BY_COLUMN.items()}
    nameless_key = "" if row["source"] else row["key"]
    return Input(**values, vanished=bool(row.get("vanished")), nameless_key=nameless_key)


class InputIndex:
    """The inputs of a previous plan and of the source.

    Call `load_previous_plan`, then `add_listed` for every listed input, then `assign_shards`; after
    that, `shards` yields the inputs in order. The file has no name, so that it is removed when the
    process ends in any way.
    """

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)
        for pragma in (
            "journal_mode=OFF",
            "synchronous=OFF",
            "temp_store=FILE",
            "cache_size=-4096",
        ):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute(_TABLE)
        self._db.execute("BEGIN")

    def __enter__(self) -> InputIndex:
        return self

    def __exit__(self, *exception: object) -> None:
        self._db.close()

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM inputs").fetchone()[0])

    def load_previous_plan(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Inserts the rows of an earlier plan. rows: in the plan's order; of equal keys, the first
        counts.
        """
        names = ("key", "source", "locator", "size", "version", "facts")
        values = (
            (*(row[name] for name in names), row["shard"], position)
            for position, row in enumerate(rows)
        )
        self._db.executemany(
            "INSERT OR IGNORE INTO inputs (key, source, locator, size, version, facts, shard, "
            "position, state) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'vanished')",
            values,
        )

    def add_listed(self, item: Input) -> None:
        """Inserts an input that the source lists, or compares it with that of the previous plan.

        Raises ConfigError if another listed input has the same name.
        """
        row = self._db.execute(
            "SELECT state, size, version, facts, locator FROM inputs WHERE key = ?", (item.key,)
        ).fetchone()
        if row is None:
            self._db.execute(
                "INSERT INTO inputs (key, source, locator, size, version, facts, state) "
                "VALUES (?, ?, ?, ?, ?, ?, 'new')",
                (item.key, item.source, item.locator, item.size, item.version, item.provenance),
            )
            return
        state, size, version, provenance, locator = row
        if state != "vanished":
            raise ConfigError(
                f"two inputs are called {item.source!r} ({locator[:200]!r} and "
                f"{item.locator[:200]!r}). Names must be unique: rename one, or give a "
                "source.name_column with unique names."
            )
        previous = replace(item, size=size, version=version, provenance=provenance)
        state = "unchanged" if previous.revision == item.revision else "changed"
        self._db.execute(
            "UPDATE inputs SET source = ?, locator = ?, size = ?, version = ?, facts = ?, "
            "state = ? WHERE key = ?",
            (
                *(item.source, item.locator, item.size, item.version, item.provenance),
                *(state, item.key),
            ),
        )

    def forget_vanished(self, keys: Iterable[str]) -> None:
        """Erases all but the key of those inputs with these keys that the source no longer lists.
        They keep their places. Call it when all listed inputs have been added.
        """
        self._db.executemany(
            "UPDATE inputs SET source = '', locator = x'', size = -1, version = '', facts = '' "
            "WHERE key = ? AND state = 'vanished'",
            ((key,) for key in keys),
        )

    def assign_shards(self, shard_size: int) -> tuple[int, int, int]:
        """Divides the new inputs, sorted by name, into new shards. These take the numbers of shards
        without inputs first (where a plan is made again, a shard's inputs may be forgotten), and
        then those after the existing ones.

        Returns the numbers of (new, changed, vanished) inputs.
        """
        planned = self._db.execute("SELECT count(shard) FROM inputs").fetchone()[0]
        shards = {row[0] for row in self._db.execute("SELECT DISTINCT shard FROM inputs")} - {None}
        end = max(shards, default=-1) + 1
        free = sorted({*range(end)} - shards)
        self._db.execute("CREATE TEMP TABLE free (n INTEGER PRIMARY KEY, shard INTEGER)")
        self._db.executemany("INSERT INTO free VALUES (?, ?)", enumerate(free))
        self._db.execute(
            "UPDATE inputs SET position = ? + n, shard = "
            "coalesce((SELECT free.shard FROM free WHERE free.n = p.n / ?), ? + p.n / ?) FROM ("
            "  SELECT key AS k, row_number() OVER (ORDER BY CAST(source AS BLOB)) - 1 AS n "
            "  FROM inputs WHERE state = 'new'"
            ") AS p WHERE key = k",
            (planned, shard_size, end - len(free), shard_size),
        )
        self._db.execute("CREATE UNIQUE INDEX by_place ON inputs (shard, position)")
        counts = dict(
            self._db.execute("SELECT state, count(*) FROM inputs GROUP BY state").fetchall()
        )
        return counts.get("new", 0), counts.get("changed", 0), counts.get("vanished", 0)

    def groups_of_equal_size(self, min_size: int, max_size: int) -> Iterator[list[Input]]:
        """Yields the listed inputs of each size that several have, in the plan's order.

        min_size, max_size: in bytes, both inclusive.
        """
        self._db.execute("CREATE INDEX by_size ON inputs (size, shard, position)")
        rows = self._db.execute(
            f"SELECT {', '.join(COLUMNS)} FROM inputs WHERE size IN ("  # noqa: S608
            "  SELECT size FROM inputs WHERE size BETWEEN ? AND ? GROUP BY size HAVING count(*) > 1"
            ") AND state <> 'vanished' ORDER BY size, shard, position",
            (min_size, max_size),
        )
        items = (input_from_row(dict(zip(COLUMNS, row, strict=True))) for row in rows)
        for _, group in itertools.groupby(items, lambda item: item.size):
            yield list(group)

    def mark_exact_copy(self, item: Input, original: Input) -> None:
        """Records that `item` has the same bytes as the earlier input `original`."""
        self._db.execute(
            "UPDATE inputs SET duplicate_of = ? WHERE key = ?", (original.source, item.key)
        )

    def shards(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Yields (shard number, its rows as column → value, `vanished` among them), in order. No
        number is left out: a shard may have no rows.
        """
        query = (
            f"SELECT shard, state = 'vanished', {', '.join(COLUMNS)} "  # noqa: S608
            "FROM inputs ORDER BY shard, position"
        )
        names = ("vanished", *COLUMNS)
        by_shard = itertools.groupby(self._db.execute(query), lambda row: row[0])
        expected = 0
        for number, rows in by_shard:
            yield from ((gap, []) for gap in range(expected, number))
            expected = number + 1
            shard = [dict(zip(names, row[1:], strict=True)) for row in rows]
            yield number, [{**row, "vanished": bool(row["vanished"])} for row in shard]
