"""Finds perceptual hashes that differ in few bits. Exact: every pair of hashes is compared.

One comparison takes half a nanosecond, so half a million hashes are compared with each other in
about a minute on two cores. An index would save little and could miss pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import faiss
import numpy as np
import numpy.typing as npt

HASH_BYTES = 32
_BLOCK = 4096  # hashes searched for at a time

Hashes = npt.NDArray[np.uint8]
"""(N, 32): a 256-bit hash in each row."""
Ints = npt.NDArray[np.int64]


class HashMatches(NamedTuple):
    """Matches of queries, P in all; sorted by query, then distance, then row.

    query, row: (P,) int64. distance: (P,) int64, in bits.
    """

    query: Ints
    row: Ints
    distance: Ints


class HashPairs(NamedTuple):
    """Pairs of groups of equal hashes: 10,000 equal images are one group, not 50 million pairs.

    first: (N,) int64, the earliest row with the same hash, which represents the group.
    left < right: (P,) int64, two such rows. distance: (P,) int64, bits in which the hashes of the
    two groups differ, at least 1.
    """

    first: Ints
    left: Ints
    right: Ints
    distance: Ints


def near_by_hash(hashes: Hashes, max_distance: int, block_rows: int = _BLOCK) -> HashPairs:
    """Returns all pairs of hashes that differ in at most `max_distance` bits."""
    if not len(hashes):
        return HashPairs(*(np.zeros(0, np.int64) for _ in range(4)))
    words = np.ascontiguousarray(hashes).view(f"V{HASH_BYTES}").ravel()
    _, earliest, group = np.unique(words, return_index=True, return_inverse=True)
    firsts = np.sort(earliest)
    parts = list(_pairs(hashes[firsts], max_distance, block_rows))
    left, right, distance = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((right, left))
    return HashPairs(
        earliest[group], firsts[left[order]], firsts[right[order]], distance[order].astype(np.int64)
    )


def _pairs(hashes: Hashes, max_distance: int, block_rows: int) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Yields (left, right, distance) with left < right, for a block of right rows at a time."""
    index = HashIndex()
    for start in range(0, len(hashes), block_rows):
        block = hashes[start : start + block_rows]
        index.add(block)
        matches = index.search(block, max_distance)
        earlier = matches.row < matches.query + start
        right = matches.query[earlier] + start
        yield matches.row[earlier], right, matches.distance[earlier]


def search_hashes(queries: Hashes, hashes: Hashes, max_distance: int) -> HashMatches:
    """Returns the rows of `hashes` that differ in at most `max_distance` bits from each query."""
    index = HashIndex()
    index.add(hashes)
    return index.search(queries, max_distance)


class HashIndex:
    """Hashes to search in; `row` in its matches counts them in the order they were added."""

    def __init__(self) -> None:
        self._index = faiss.IndexBinaryFlat(8 * HASH_BYTES)

    def add(self, hashes: Hashes) -> None:
        self._index.add(np.ascontiguousarray(hashes))

    def search(self, queries: Hashes, max_distance: int) -> HashMatches:
        """Returns the added hashes that differ in at most `max_distance` bits from each query."""
        parts = [
            self._search_block(queries, start, max_distance)
            for start in range(0, max(len(queries), 1), _BLOCK)
        ]
        return HashMatches(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _search_block(self, queries: Hashes, start: int, max_distance: int) -> HashMatches:
        block = np.ascontiguousarray(queries[start : start + _BLOCK])
        # faiss returns distances below its radius, so the radius is one more than the maximum
        limits, distance, row = self._index.range_search(block, max_distance + 1)
        query = np.repeat(np.arange(len(block)), np.diff(limits).astype(np.int64))
        order = np.lexsort((row, distance, query))
        return HashMatches(query[order] + start, row[order], distance[order].astype(np.int64))
