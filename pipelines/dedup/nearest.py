"""Finds the nearest neighbours by ArcFace identity: exactly up to `exact_rows` vectors, above that
with an inverted file index (IVF), which compares a vector with those in the nearest cells only.

The index only chooses candidates. It stores the first 128 principal components in half precision:
four times as many candidates can be compared in the same time as with whole vectors. Every
similarity that is returned is then recomputed pair by pair in float32. So it depends on its two
vectors alone, not on the index, the batch or the number of threads. Which candidates the index
returns may differ between kinds of processors, because their matrix products round differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import faiss
import numpy as np
import numpy.typing as npt

from pipelines.dedup.hashes import Ints

# Up to this many vectors all are compared, which takes a minute on two idle cores. The index is
# faster, but misses some neighbours.
EXACT_ROWS = 100_000
PROBES = 64  # cells searched for each vector
_BLOCK = 1024  # vectors searched for at a time
_CELL_ROWS = 244  # vectors in a cell
_COMPONENTS = 128
# Candidates fetched per neighbour wanted: principal components rank them a little differently.
_CANDIDATE_FACTOR = 2
_TRAINING_ROWS = 40  # vectors per cell that the cells are trained on; faiss warns below 39
_SEED = 1234  # of k-means

Floats = npt.NDArray[np.float32]
Vectors = npt.NDArray[np.float32] | npt.NDArray[np.float16]
"""(N, D) of unit norm, in memory or memory-mapped: a block of rows is read at a time. A row of
zeros has no neighbours.
"""


class Neighbours(NamedTuple):
    """The k nearest neighbours of N vectors, nearest first.

    row: (N, k) int64, -1 where there are fewer than k. similarity: (N, k) float32, cosines; 0 where
    row is -1.
    """

    row: Ints
    similarity: Floats


def near_by_identity(
    vectors: Vectors,
    min_similarity: float,
    k: int,
    exact_rows: int = EXACT_ROWS,
    probes: int = PROBES,
) -> Neighbours:
    """Returns each vector's `k` nearest others with a cosine of at least `min_similarity`.

    Raises ValueError unless `min_similarity` is over 0.
    """
    if not min_similarity > 0:
        raise ValueError(f"min_similarity={min_similarity}: expected over 0")
    neighbours = _no_neighbours(len(vectors), k)
    index = IdentityIndex(vectors, exact_rows, probes)
    index.add(np.arange(len(vectors)))
    for rows in _blocks(len(vectors)):
        # k + 1: the vector itself is among them, unless k + 1 others are just as near
        nearest = index.nearest(rows, k + 1)
        valid = (nearest.row != rows[:, None]) & (nearest.similarity >= min_similarity)
        columns = np.argsort(~valid, axis=1, kind="stable")[:, :k]  # valid ones first, in order
        valid = np.take_along_axis(valid, columns, 1)
        width = columns.shape[1]
        row = np.take_along_axis(nearest.row, columns, 1)
        similarity = np.take_along_axis(nearest.similarity, columns, 1)
        neighbours.row[rows, :width] = np.where(valid, row, -1)
        neighbours.similarity[rows, :width] = np.where(valid, similarity, 0)
    return neighbours


def _no_neighbours(count: int, k: int) -> Neighbours:
    return Neighbours(np.full((count, k), -1, np.int64), np.zeros((count, k), np.float32))


def similarities(vectors: Vectors, left: Ints, right: Ints) -> Floats:
    """Returns (P,) float32 cosines of rows `left` (P,) with rows `right` (P,) of `vectors`.

    A cosine depends on its two vectors alone, not on the other pairs.
    """
    cosines = np.zeros(len(left), np.float32)
    for start in range(0, len(left), _BLOCK):  # a block stays in the processor's cache
        part = slice(start, start + _BLOCK)
        one, other = vectors[left[part]].astype(np.float32), vectors[right[part]].astype(np.float32)
        cosines[part] = np.einsum("pd,pd->p", one, other)
    return cosines


class IdentityIndex:
    """Searches for the nearest among those rows of `vectors` that have been added so far.

    Exact up to `exact_rows`. When there are more, and again at four times as many, an IVF index is
    trained on the rows added so far. So results depend on the rows added before, never on those
    added later.
    """

    def __init__(
        self, vectors: Vectors, exact_rows: int = EXACT_ROWS, probes: int = PROBES
    ) -> None:
        self._vectors, self._exact_rows, self._probes = vectors, exact_rows, probes
        self._parts: list[Ints] = []
        self._count = 0
        self._rebuild_above = exact_rows
        self._index: Any = faiss.IndexFlatIP(vectors.shape[1])

    def add(self, rows: Ints) -> None:
        self._parts.append(rows)
        self._count += len(rows)
        if self._count > self._rebuild_above:
            self._rebuild_above = 4 * self._count
            self._parts = [np.concatenate(self._parts)]
            self._index = self._train(self._parts[0])
            rows = self._parts[0]
        for part in _blocks(len(rows), 16 * _BLOCK):
            self._index.add(self._vectors[rows[part]].astype(np.float32))

    def nearest(self, queries: Ints, k: int) -> Neighbours:
        """Returns the `k` nearest of the added rows for each row of `queries` (with fewer columns
        than `k` if fewer rows were added).

        A query that was added itself is among its neighbours. Equally near rows: earliest first.
        """
        if not self._count or not len(queries):
            return _no_neighbours(len(queries), k)
        candidates = k if isinstance(self._index, faiss.IndexFlatIP) else _CANDIDATE_FACTOR * k
        _, places = self._index.search(
            self._vectors[queries].astype(np.float32), min(candidates, self._count)
        )
        self._parts = [np.concatenate(self._parts)] if len(self._parts) > 1 else self._parts
        rows = np.where(places >= 0, self._parts[0][places], -1)
        repeated = np.repeat(queries, rows.shape[1])
        cosines = similarities(self._vectors, repeated, rows.ravel()).reshape(rows.shape)
        cosines[rows < 0] = -2  # sorts them last
        order = np.lexsort((rows, -cosines), axis=1)[:, :k]
        rows, cosines = np.take_along_axis(rows, order, 1), np.take_along_axis(cosines, order, 1)
        return Neighbours(rows, np.where(rows < 0, np.float32(0), cosines))

    def _train(self, rows: Ints) -> Any:
        """Returns an empty IVF index trained on an even sample of `rows`."""
        count = max(1, len(rows) // _CELL_ROWS)
        size = min(len(rows), _TRAINING_ROWS * count)
        sample = rows[np.linspace(0, len(rows) - 1, size).astype(np.int64)]
        dim = self._vectors.shape[1]
        components = f"PCA{_COMPONENTS}," if dim > _COMPONENTS else ""
        index: Any = faiss.index_factory(
            dim, f"{components}IVF{count},SQfp16", faiss.METRIC_INNER_PRODUCT
        )
        cells = faiss.extract_index_ivf(index)
        cells.cp.niter, cells.cp.seed, cells.nprobe = 8, _SEED, min(self._probes, count)
        index.train(self._vectors[sample].astype(np.float32))
        return index


def _blocks(count: int, size: int = _BLOCK) -> Iterator[Ints]:
    for start in range(0, count, size):
        yield np.arange(start, min(start + size, count))
