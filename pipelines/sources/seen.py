"""Seen: a set of names of any number, on local disk."""

from __future__ import annotations

import hashlib
import sqlite3
from types import TracebackType


class Seen:
    """Names by digest, in a file that is gone when closed."""

    def __enter__(self) -> Seen:
        self._db = sqlite3.connect("")
        self._db.execute("CREATE TABLE names (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._db.close()

    def add(self, name: str) -> bool:
        """True the first time."""
        digest = hashlib.sha256(name.encode()).digest()[:16]
        return self._db.execute("INSERT OR IGNORE INTO names VALUES (?)", (digest,)).rowcount > 0
