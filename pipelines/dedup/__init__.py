"""Which pictures are alike: copies of each other, of the same person, and on which side of the
split. Arrays only.

Rows are pictures in the plan's order; a lower row came earlier.
"""

from __future__ import annotations

from pipelines.dedup.clusters import cluster, split_of
from pipelines.dedup.duplicates import Duplicate, find_duplicates
from pipelines.dedup.hashes import HashPairs, near_by_hash, within
from pipelines.dedup.nearest import Neighbours, near_by_identity, similarities

__all__ = [
    "Duplicate",
    "HashPairs",
    "Neighbours",
    "cluster",
    "find_duplicates",
    "near_by_hash",
    "near_by_identity",
    "similarities",
    "split_of",
    "within",
]
