"""The nearest by ArcFace identity: exact up to `exact_rows` pictures, by cells (IVF) above.

Cells only choose candidates, by the vectors' first 128 principal components in half precision: for
the same time, four times as many can be looked at as whole. Every similarity that is answered is
computed anew, pair by pair in float32, so that a figure depends on its two vectors alone: not on
the index, the batch or the threads. Which candidates are found may differ between kinds of
processors, whose matrix products round differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import faiss
import numpy as np
import numpy.typing as npt

from pipelines.dedup.hashes import Ints

# up to here all are compared: a minute on two idle cores, for cells lose what they save in speed
EXACT_ROWS = 100_000
PROBES = 64  # cells searched for each vector
_BLOCK = 1024  # vectors looked up at a time
_CELL_ROWS = 244  # vectors to a cell
_COMPONENTS = 128
# times as many candidates as answers: whole vectors are in another order than their components
_MORE = 2
_SAMPLE = 40  # vectors to a cell that the cells are trained on; faiss warns under 39
_SEED = 1234  # of k-means

Floats = npt.NDArray[np.float32]
Vectors = npt.NDArray[np.float32] | npt.NDArray[np.float16]
"""(N, D) of unit norm, in memory or a memmap: some rows are read at a time. A row of zeros is near
nothing.
"""


class Neighbours(NamedTuple):
    """row: (N, k) int64, the closest first, -1 where there are fewer. similarity: (N, k) float32
    cosines, 0 there.
    """

    row: Ints
    similarity: Floats


def near_by_identity(
    vectors: Vectors,
    least_similarity: float,
    k: int,
    exact_rows: int = EXACT_ROWS,
    probes: int = PROBES,
) -> Neighbours:
    """Each vector's up to `k` nearest others with a cosine of at least `least_similarity` (over 0)."""
    if not least_similarity > 0:
        raise ValueError(f"least_similarity={least_similarity}: expected over 0")
    found = Neighbours(
        np.full((len(vectors), k), -1, np.int64), np.zeros((len(vectors), k), np.float32)
    )
    index = IdentityIndex(vectors, exact_rows, probes)
    index.add(np.arange(len(vectors)))
    for rows in _blocks(len(vectors)):
        near = index.nearest(rows, k + 1)  # itself is one of them, or as near as them all
        good = (near.row != rows[:, None]) & (near.similarity >= least_similarity)
        places = np.argsort(~good, axis=1, kind="stable")[:, :k]
        good = np.take_along_axis(good, places, 1)
        width = places.shape[1]
        found.row[rows, :width] = np.where(good, np.take_along_axis(near.row, places, 1), -1)
        found.similarity[rows, :width] = np.where(
            good, np.take_along_axis(near.similarity, places, 1), 0
        )
    return found


def similarities(vectors: Vectors, left: Ints, right: Ints) -> Floats:
    """(P,) cosines of rows `left` with rows `right`, each from its two vectors alone."""
    found = np.zeros(len(left), np.float32)
    for start in range(0, len(left), _BLOCK):  # so few stay in the processor's cache
        part = slice(start, start + _BLOCK)
        one, other = vectors[left[part]].astype(np.float32), vectors[right[part]].astype(np.float32)
        found[part] = np.einsum("pd,pd->p", one, other)
    return found


class IdentityIndex:
    """The nearest of the rows of `vectors` added so far.

    Exact while they are few. Once over `exact_rows`, and whenever four times as many as then, cells
    are trained on those that are there: what is found depends on what was added before, never on
    what comes later.
    """

    def __init__(
        self, vectors: Vectors, exact_rows: int = EXACT_ROWS, probes: int = PROBES
    ) -> None:
        self._vectors, self._exact_rows, self._probes = vectors, exact_rows, probes
        self._parts: list[Ints] = []
        self._count = 0
        self._grown_at = exact_rows
        self._index: Any = faiss.IndexFlatIP(vectors.shape[1])

    def add(self, rows: Ints) -> None:
        self._parts.append(rows)
        self._count += len(rows)
        if self._count > self._grown_at:
            self._grown_at = 4 * self._count
            self._parts = [np.concatenate(self._parts)]
            self._index = self._cells(self._parts[0])
            rows = self._parts[0]
        for part in _blocks(len(rows), 16 * _BLOCK):
            self._index.add(self._vectors[rows[part]].astype(np.float32))

    def nearest(self, queries: Ints, k: int) -> Neighbours:
        """Up to `k` of the rows added for each row of `queries`, itself too where it was added;
        ties: the earliest.
        """
        if not self._count or not len(queries):
            return Neighbours(
                np.full((len(queries), k), -1, np.int64), np.zeros((len(queries), k), np.float32)
            )
        ask = k if isinstance(self._index, faiss.IndexFlatIP) else _MORE * k
        _, places = self._index.search(
            self._vectors[queries].astype(np.float32), min(ask, self._count)
        )
        self._parts = [np.concatenate(self._parts)] if len(self._parts) > 1 else self._parts
        rows = np.where(places >= 0, self._parts[0][places], -1)
        exact = similarities(
            self._vectors, np.repeat(queries, rows.shape[1]), rows.ravel()
        ).reshape(rows.shape)
        exact[rows < 0] = -2  # behind all others
        order = np.lexsort((rows, -exact), axis=1)
        order = order[:, :k]
        rows, exact = np.take_along_axis(rows, order, 1), np.take_along_axis(exact, order, 1)
        return Neighbours(rows, np.where(rows < 0, np.float32(0), exact))

    def _cells(self, rows: Ints) -> Any:
        count = max(1, len(rows) // _CELL_ROWS)
        sample = rows[
            np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLE * count)).astype(np.int64)
        ]
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
