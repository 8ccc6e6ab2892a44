"""InputIndex: millions of inputs, sorted and compared in an SQLite file, in little memory."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Final

from configs.errors import ConfigError
from pipelines.sources import Input

COLUMNS: Final = ("key", "source", "locator", "size", "version", "facts", "duplicate_of")
_TABLE: Final = """
CREATE TABLE inputs (
    key TEXT PRIMARY KEY, source TEXT, locator BLOB, size INTEGER, version TEXT, facts TEXT,
    duplicate_of TEXT NOT NULL DEFAULT '', shard INTEGER, position INTEGER,
    state TEXT  -- vanished (known, and not seen yet), known, changed, new
) WITHOUT ROWID
"""


class InputIndex:
    """First `load_known`, then `see` every listed input, then `place` them; `shards` gives them
    back in order.

    Its file has no name: it goes with the process, however that ends.
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._db.close()

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM inputs").fetchone()[0])

    def load_known(self, rows: Iterable[dict[str, Any]]) -> None:
        """Rows of an earlier plan, in its order."""
        names = ("key", "source", "locator", "size", "version", "facts")
        given = (
            (*(row[name] for name in names), row["shard"], position)
            for position, row in enumerate(rows)
        )
        self._db.executemany(
            "INSERT INTO inputs (key, source, locator, size, version, facts, shard, position, "
            "state) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'vanished')",
            given,
        )

    def see(self, item: Input) -> None:
        """An input that the source lists. Raises ConfigError where two of them would have the same
        name.
        """
        given = (item.key, item.source, item.locator, item.size, item.version, item.facts)
        found = self._db.execute(
            "SELECT state, size, version, locator FROM inputs WHERE key = ?", (item.key,)
        ).fetchone()
        if found is None:
            self._db.execute(
                "INSERT INTO inputs (key, source, locator, size, version, facts, state) "
                "VALUES (?, ?, ?, ?, ?, ?, 'new')",
                given,
            )
            return
        state, size, version, locator = found
        if state != "vanished":
            raise ConfigError(
                f"two inputs are called {item.source!r} ({locator[:200]!r} and "
                f"{item.locator[:200]!r}). "
                "Names must be unique: rename one, or name rows by another source.name_column."
            )
        state = "known" if (size, version) == (item.size, item.version) else "changed"
        self._db.execute(
            "UPDATE inputs SET locator = ?, size = ?, version = ?, facts = ?, state = ? WHERE "
            "key = ?",
            (item.locator, item.size, item.version, item.facts, state, item.key),
        )

    def place(self, shard_size: int) -> tuple[int, int, int]:
        """Cut new inputs, sorted by name, into shards behind the known ones; how many are new,
        changed, vanished.
        """
        last, rows = self._db.execute(
            "SELECT coalesce(max(shard), -1), count(shard) FROM inputs"
        ).fetchone()
        self._db.execute(
            "UPDATE inputs SET position = ? + n, shard = ? + n / ? FROM ("
            "  SELECT key AS k, row_number() OVER (ORDER BY CAST(source AS BLOB)) - 1 AS n FROM "
            "inputs "
            "  WHERE state = 'new'"
            ") WHERE key = k",
            (rows, last + 1, shard_size),
        )
        self._db.execute("CREATE UNIQUE INDEX by_place ON inputs (position)")
        counts = dict(
            self._db.execute("SELECT state, count(*) FROM inputs GROUP BY state").fetchall()
        )
        return counts.get("new", 0), counts.get("changed", 0), counts.get("vanished", 0)

    def same_size(self, least: int, most: int) -> Iterator[list[Input]]:
        """Groups of inputs of equal size, from `least` to `most` bytes, each in the plan's order."""
        self._db.execute("CREATE INDEX by_size ON inputs (size, position)")
        names = "source, locator, size, version, facts"
        found = self._db.execute(
            f"SELECT {names} FROM inputs WHERE size IN ("  # noqa: S608 - no value comes from outside
            "  SELECT size FROM inputs WHERE size BETWEEN ? AND ? GROUP BY size HAVING count(*) > 1"
            ") ORDER BY size, position",
            (least, most),
        )
        items = (Input(**dict(zip(names.split(", "), row, strict=True))) for row in found)
        for _, group in itertools.groupby(items, lambda item: item.size):
            yield list(group)

    def mark_copy(self, item: Input, of: Input) -> None:
        self._db.execute("UPDATE inputs SET duplicate_of = ? WHERE key = ?", (of.source, item.key))

    def shards(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Each shard's number and rows, in order."""
        query = f"SELECT shard, {', '.join(COLUMNS)} FROM inputs ORDER BY position"  # noqa: S608
        found = self._db.execute(query)
        for number, rows in itertools.groupby(found, lambda row: row[0]):
            yield number, [dict(zip(COLUMNS, row[1:], strict=True)) for row in rows]
