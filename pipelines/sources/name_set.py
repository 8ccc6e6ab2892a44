"""NameSet: a set of names that is too large for memory, in a temporary file on local disk."""

from __future__ import annotations

import hashlib
import sqlite3


class NameSet:
    """Stores a 16-byte digest of each name. The file is deleted when the set is closed."""

    def __enter__(self) -> NameSet:
        self._db = sqlite3.connect("")  # "": a temporary file without a name
        self._db.execute("CREATE TABLE names (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        return self

    def __exit__(self, *exception: object) -> None:
        self._db.close()

    def add(self, name: str) -> bool:
        """Add `name`; returns True if it was not in the set before."""
        digest = hashlib.sha256(name.encode()).digest()[:16]
        return self._db.execute("INSERT OR IGNORE INTO names VALUES (?)", (digest,)).rowcount > 0
