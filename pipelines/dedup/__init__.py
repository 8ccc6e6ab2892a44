"""Compares all samples: finds duplicates, clusters identities and assigns the train/val split.

Works on arrays; their rows are the samples in the plan's order, so a lower row is an earlier input.
The global pass (global_pass.py) applies the results to a data set.
"""

from __future__ import annotations

from pipelines.dedup.clusters import cluster, split_of
from pipelines.dedup.duplicates import Duplicate, find_duplicates
from pipelines.dedup.hashes import HashMatches, HashPairs, near_by_hash, search_hashes
from pipelines.dedup.nearest import Neighbours, near_by_identity, similarities

__all__ = [
    "Duplicate",
    "HashMatches",
    "HashPairs",
    "Neighbours",
    "cluster",
    "find_duplicates",
    "near_by_hash",
    "near_by_identity",
    "search_hashes",
    "similarities",
    "split_of",
]
