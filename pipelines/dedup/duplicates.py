"""Finds the samples that duplicate an earlier one: by bytes, perceptual hash or face.

Greedy, in order: a sample is compared with the earlier samples that are kept only. Samples added
behind therefore change no earlier result. Kept samples differ from each other, so a thousand nearly
equal images take a thousand comparisons instead of half a million, and a duplicate isn't missed
because the one it resembles was itself dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.dedup.hashes import Hashes, HashIndex, Ints
from pipelines.dedup.nearest import Floats, IdentityIndex, Vectors, similarities

_BLOCK = 1024  # rows compared before those kept among them are added to the indexes
EXACT_ROWS = 30_000  # while no more rows are kept, faces are compared exactly
# IVF cells searched: vectors with a cosine of 0.95 mostly have several of their nearest in common
_PROBES = 8
_CANDIDATES = 4
_ROUNDING = np.float32(1e-3)  # error of a matrix product; values this close are recomputed
_NO_HASH = 1 << 30  # bits: over any limit

Bools = npt.NDArray[np.bool_]


class Duplicate(NamedTuple):
    """Why a row is a duplicate.

    reason: duplicate, near_duplicate or face_duplicate. of: the earlier, kept row that it
    duplicates; the closest one, of equally close ones the earliest. metric: bits in which the
    hashes differ (near_duplicate), cosine (face_duplicate), or 0 (duplicate).
    """

    reason: str
    of: int
    metric: float


class _Block(NamedTuple):
    """Distances of a block's B rows to each other, and to the nearest row kept before the block
    (-1 if none is near).
    """

    bits: npt.NDArray[np.int64]  # (B, B); _NO_HASH where a hash is missing
    cosines: Floats  # (B, B); exact where they are close to the limit
    has_near: Bools  # (B,) whether any other row of the block is within the limits
    nearest_hash: tuple[Ints, Ints]  # (row, bits)
    nearest_face: tuple[Ints, Floats]  # (row, cosine)


def find_duplicates(
    sha256: Sequence[str],
    hashes: Hashes,
    vectors: Vectors,
    max_distance: int,
    max_similarity: float,
    exact_rows: int = EXACT_ROWS,
    block_rows: int = _BLOCK,
) -> dict[int, Duplicate]:
    """Returns row → Duplicate, for each row that duplicates an earlier one that is kept.

    sha256: of the source bytes, "" if unknown. hashes: (N, 32), zeros if there is none (or the
    image has no structure). vectors: (N, D) identities, zeros if there is none. max_distance: in
    bits; -1 compares no hashes. max_similarity: cosine from which faces are duplicates; 0 compares
    no faces. Exact, except for faces once more than `exact_rows` rows are kept (see IdentityIndex).
    """
    duplicates: dict[int, Duplicate] = {}
    row_by_sha256: dict[str, int] = {}
    index = _KeptRows(hashes, vectors, max_distance, max_similarity, exact_rows)
    for start in range(0, len(sha256), block_rows):
        rows = np.arange(start, min(start + block_rows, len(sha256)))
        block = index.look_up(rows)
        is_kept = np.zeros(len(rows), np.bool_)
        for place, row in enumerate(rows.tolist()):
            digest = sha256[row]
            if digest and digest in row_by_sha256:
                duplicates[row] = Duplicate("duplicate", row_by_sha256[digest], 0.0)
            elif (duplicate := index.match(block, place, is_kept, start)) is not None:
                duplicates[row] = duplicate
            else:
                is_kept[place] = True
                row_by_sha256[digest] = row
        index.add(rows[is_kept])
    return duplicates


class _KeptRows:
    """Indexes of the rows that are kept, by hash and by face."""

    def __init__(
        self,
        hashes: Hashes,
        vectors: Vectors,
        max_distance: int,
        max_similarity: float,
        exact_rows: int,
    ) -> None:
        self._hashes, self._vectors = hashes, vectors
        self._max_distance, self._max_similarity = max_distance, max_similarity or np.inf
        self._hash_index, self._hashed_rows = HashIndex(), np.zeros(0, np.int64)
        self._face_index = IdentityIndex(vectors, exact_rows, _PROBES)

    def add(self, rows: Ints) -> None:
        hashed = rows[self._hashes[rows].any(1)]
        self._hash_index.add(self._hashes[hashed])
        self._hashed_rows = np.concatenate([self._hashed_rows, hashed])
        if np.isfinite(self._max_similarity):
            self._face_index.add(rows[np.any(self._vectors[rows], axis=1)])

    def look_up(self, rows: Ints) -> _Block:
        bits, cosines = self._bits(rows), self._cosines(rows)
        close: Bools = np.logical_or(bits <= self._max_distance, cosines >= self._max_similarity)
        np.fill_diagonal(close, False)
        has_near = np.asarray(close.any(1))
        return _Block(bits, cosines, has_near, self._nearest_hash(rows), self._nearest_face(rows))

    def match(self, block: _Block, place: int, is_kept: Bools, start: int) -> Duplicate | None:
        """Returns what the row at `place` of a block duplicates by hash or face, or None.

        Considers the rows kept before the block and those kept in it so far (`is_kept`, (B,)).
        start: the block's first row.
        """
        hash_row, bits = int(block.nearest_hash[0][place]), int(block.nearest_hash[1][place])
        face_row, cosine = int(block.nearest_face[0][place]), float(block.nearest_face[1][place])
        if block.has_near[place]:
            places = np.flatnonzero(is_kept[:place])
            if len(places):
                nearest = places[block.bits[place, places].argmin()]
                if block.bits[place, nearest] < bits:
                    hash_row, bits = start + int(nearest), int(block.bits[place, nearest])
                nearest = places[block.cosines[place, places].argmax()]
                if block.cosines[place, nearest] > cosine:
                    face_row, cosine = start + int(nearest), float(block.cosines[place, nearest])
        if bits <= self._max_distance:
            return Duplicate("near_duplicate", hash_row, float(bits))
        if cosine >= self._max_similarity:
            return Duplicate("face_duplicate", face_row, cosine)
        return None

    def _bits(self, rows: Ints) -> npt.NDArray[np.int64]:
        """(B, B) bits in which the rows' hashes differ."""
        hashes = np.ascontiguousarray(self._hashes[rows])
        words, missing = hashes.view(np.uint64), ~hashes.any(1)
        bits = sum(
            np.bitwise_count(word[:, None] ^ word[None]).astype(np.int64) for word in words.T
        )
        assert isinstance(bits, np.ndarray), "a hash has words"
        bits[missing] = bits[:, missing] = _NO_HASH
        return bits

    def _cosines(self, rows: Ints) -> Floats:
        """(B, B) cosines of the rows' vectors; zeros if faces aren't compared."""
        if not np.isfinite(self._max_similarity):
            return np.zeros((len(rows), len(rows)), np.float32)
        units = self._vectors[rows].astype(np.float32)
        cosines = units @ units.T
        left, right = np.nonzero(cosines >= self._max_similarity - _ROUNDING)
        cosines[left, right] = similarities(self._vectors, rows[left], rows[right])
        return np.asarray(cosines, np.float32)

    def _nearest_hash(self, rows: Ints) -> tuple[Ints, Ints]:
        """((B,) kept row, (B,) bits): the nearest by hash, else (-1, _NO_HASH)."""
        row, bits = np.full(len(rows), -1, np.int64), np.full(len(rows), _NO_HASH, np.int64)
        hashed = np.flatnonzero(self._hashes[rows].any(1))
        if len(hashed) and len(self._hashed_rows) and self._max_distance >= 0:
            matches = self._hash_index.search(self._hashes[rows[hashed]], self._max_distance)
            # the first match of a query is its nearest, of equally near ones the earliest
            query, first = np.unique(matches.query, return_index=True)
            row[hashed[query]] = self._hashed_rows[matches.row[first]]
            bits[hashed[query]] = matches.distance[first]
        return row, bits

    def _nearest_face(self, rows: Ints) -> tuple[Ints, Floats]:
        """((B,) kept row, (B,) cosine): the nearest by face, else (-1, -1)."""
        nearest = self._face_index.nearest(rows, _CANDIDATES)
        row = nearest.row[:, 0]
        return row, np.where(row < 0, np.float32(-1), nearest.similarity[:, 0])
