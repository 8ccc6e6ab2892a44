"""Take-down: removes images, or all images of a person, from a data set, and logs it.

`matching` says which records a request means, `page` shows them to the operator, `removal` removes
them, and `proof` checks that nothing of them is left and says what that proves.

The log (takedown.jsonl) is written first: it states which inputs must never be processed again. It
contains keys and digests, but no names of files or people; embeddings only of people whose request
asked for it (`--block-person`). Then the shards with removed records are rewritten. A row with the
key remains in the sidecar, so that the ledger still adds up. The same files are refused under any
name while the log exists. plan.parquet still has their names, since the source still lists them:
delete them from the source.
"""

from __future__ import annotations

from pipelines.takedown.matching import (
    Match,
    PhotoRequest,
    Search,
    by_hash,
    by_photo,
    by_source,
    digest_of,
)
from pipelines.takedown.page import write_page
from pipelines.takedown.proof import Removals, lint_removals, statements
from pipelines.takedown.rates import rates
from pipelines.takedown.removal import (
    By,
    check_blocked,
    finish,
    is_unfinished,
    release,
    take_down,
)

__all__ = [
    "By",
    "Match",
    "PhotoRequest",
    "Removals",
    "Search",
    "by_hash",
    "by_photo",
    "by_source",
    "check_blocked",
    "digest_of",
    "finish",
    "is_unfinished",
    "lint_removals",
    "rates",
    "release",
    "statements",
    "take_down",
    "write_page",
]
