"""Perceptual hashes within some bits of each other: exact, by comparing all of them.

A comparison takes half a nanosecond, so half a million hashes are all compared in about a minute on
two cores; no index is needed, and none that could miss a pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import faiss
import numpy as np
import numpy.typing as npt

HASH_BYTES = 32
_BLOCK = 4096  # hashes looked up at a time

Hashes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


class Hits(NamedTuple):
    """(query, row, distance), each (P,) int64; by query, then the closest first, then the earliest."""

    query: Ints
    row: Ints
    distance: Ints


class HashPairs(NamedTuple):
    """Pairs of groups of equal hashes: 10,000 equal pictures are one group, not 50 million pairs.

    first: (N,) the earliest row with the same hash. left < right: (P,) rows that are first of their
    groups, `distance` (at least 1) bits apart; every row of one group is that far from every row of
    the other.
    """

    first: Ints
    left: Ints
    right: Ints
    distance: Ints


def near_by_hash(hashes: Hashes, max_distance: int, block_rows: int = _BLOCK) -> HashPairs:
    """All pairs of (N, 32) `hashes` at most `max_distance` bits apart."""
    if not len(hashes):
        return HashPairs(*(np.zeros(0, np.int64) for _ in range(4)))
    words = np.ascontiguousarray(hashes).view(f"V{HASH_BYTES}").ravel()
    _, earliest, group = np.unique(words, return_index=True, return_inverse=True)
    firsts = np.sort(earliest)
    parts = list(_triangle(hashes[firsts], max_distance, block_rows))
    left, right, distance = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((right, left))
    return HashPairs(
        earliest[group], firsts[left[order]], firsts[right[order]], distance[order].astype(np.int64)
    )


def _triangle(
    hashes: Hashes, max_distance: int, block_rows: int
) -> Iterator[tuple[Ints, Ints, Ints]]:
    """(left, right, distance) with left < right, some blocks of right at a time."""
    index = HashIndex()
    for start in range(0, len(hashes), block_rows):
        block = hashes[start : start + block_rows]
        index.add(block)
        found = index.within(block, max_distance)
        earlier = found.row < found.query + start
        yield found.row[earlier], found.query[earlier] + start, found.distance[earlier]


def within(queries: Hashes, hashes: Hashes, max_distance: int) -> Hits:
    """Rows of (N, 32) `hashes` at most `max_distance` bits from each of (Q, 32) `queries`."""
    index = HashIndex()
    index.add(hashes)
    return index.within(queries, max_distance)


class HashIndex:
    """Hashes, numbered as they are added."""

    def __init__(self) -> None:
        self._index = faiss.IndexBinaryFlat(8 * HASH_BYTES)

    def add(self, hashes: Hashes) -> None:
        self._index.add(np.ascontiguousarray(hashes))

    def within(self, queries: Hashes, max_distance: int) -> Hits:
        """See `within`; numbers in place of rows."""
        parts = [
            self._block(queries, start, max_distance)
            for start in range(0, max(len(queries), 1), _BLOCK)
        ]
        return Hits(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _block(self, queries: Hashes, start: int, max_distance: int) -> Hits:
        block = np.ascontiguousarray(queries[start : start + _BLOCK])
        # faiss: under, not up to
        limits, distance, row = self._index.range_search(block, max_distance + 1)
        query = np.repeat(np.arange(len(block)), np.diff(limits).astype(np.int64))
        order = np.lexsort((row, distance, query))
        return Hits(query[order] + start, row[order], distance[order].astype(np.int64))
