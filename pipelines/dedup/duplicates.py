"""Which pictures are copies of an earlier one that stays: greedy, in order, so more pictures behind
change nothing.

A picture is compared with those kept only. They are far apart from each other, so a thousand
near-equal pictures make a thousand comparisons and not half a million pairs, and no copy hides
behind copies that were dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.dedup.hashes import Hashes, HashIndex, Ints
from pipelines.dedup.nearest import Floats, IdentityIndex, Vectors, similarities

_BLOCK = 1024  # rows judged before those that were kept are indexed
EXACT_ROWS = 30_000  # as long as no more are kept, all are compared
_PROBES = 8  # cells: vectors with a cosine of 0.95 mostly share the nearest few
_CANDIDATES = 4
_ROUNDING = np.float32(1e-3)  # what a matrix product may be off; its candidates are computed anew

Bools = npt.NDArray[np.bool_]


class Duplicate(NamedTuple):
    """reason: duplicate, near_duplicate or face_duplicate. of: the earlier row, kept; the closest,
    of equally close the earliest. figure: bits between the hashes (0 of a duplicate), or the
    cosine.
    """

    reason: str
    of: int
    figure: float


class _Block(NamedTuple):
    """A block's rows against each other, and against those kept before it (row or -1, and its
    figure).
    """

    bits: npt.NDArray[np.int64]  # (B, B); over any limit where a hash is missing
    cosines: Floats  # (B, B); from similarities where they come close to the limit
    near: Bools  # (B,) rows that have anything near in the block
    by_hash: tuple[Ints, Ints]
    by_face: tuple[Ints, Floats]


def find_duplicates(
    sha256: Sequence[str],
    hashes: Hashes,
    vectors: Vectors,
    max_distance: int,
    max_similarity: float,
    exact_rows: int = EXACT_ROWS,
    block_rows: int = _BLOCK,
) -> dict[int, Duplicate]:
    """Row → why it goes, for each row that is a copy of an earlier one that stays.

    sha256: of the sources, "" where unknown. hashes: (N, 32), all zeros where there is none (and of
    a picture without any structure). vectors: (N, D) identities, zeros where there is none.
    max_distance: -1 compares no hashes. max_similarity: 0 compares no faces. Exact, but for faces
    once over `exact_rows` are kept (see IdentityIndex).
    """
    found: dict[int, Duplicate] = {}
    by_sha: dict[str, int] = {}
    index = _Kept(hashes, vectors, max_distance, max_similarity, exact_rows)
    for start in range(0, len(sha256), block_rows):
        rows = np.arange(start, min(start + block_rows, len(sha256)))
        block = index.look_up(rows)
        stays = np.zeros(len(rows), np.bool_)
        for place, row in enumerate(rows.tolist()):
            sha = sha256[row]
            if sha and sha in by_sha:
                found[row] = Duplicate("duplicate", by_sha[sha], 0.0)
            elif (twin := index.judge(block, place, stays, start)) is not None:
                found[row] = twin
            else:
                stays[place] = True
                by_sha[sha] = row
        index.add(rows[stays])
    return found


class _Kept:
    """The rows that stay, by hash and by face."""

    def __init__(
        self,
        hashes: Hashes,
        vectors: Vectors,
        max_distance: int,
        max_similarity: float,
        exact_rows: int,
    ) -> None:
        self._hashes, self._vectors = hashes, vectors
        self._distance, self._similarity = max_distance, max_similarity or np.inf
        self._by_hash, self._hashed = HashIndex(), np.zeros(0, np.int64)
        self._by_face = IdentityIndex(vectors, exact_rows, _PROBES)

    def add(self, rows: Ints) -> None:
        hashed = rows[self._hashes[rows].any(1)]
        self._by_hash.add(self._hashes[hashed])
        self._hashed = np.concatenate([self._hashed, hashed])
        if np.isfinite(self._similarity):
            self._by_face.add(rows[np.any(self._vectors[rows], axis=1)])

    def look_up(self, rows: Ints) -> _Block:
        bits, cosines = self._bits(rows), self._cosines(rows)
        close: Bools = np.logical_or(bits <= self._distance, cosines >= self._similarity)
        np.fill_diagonal(close, False)
        return _Block(
            bits,
            cosines,
            np.asarray(close.any(1)),
            self._nearest_hash(rows),
            self._nearest_face(rows),
        )

    def judge(self, block: _Block, place: int, stays: Bools, start: int) -> Duplicate | None:
        """The verdict on a block's row: against those kept before the block, then against those
        kept in it.
        """
        row, bits = int(block.by_hash[0][place]), int(block.by_hash[1][place])
        other, cosine = int(block.by_face[0][place]), float(block.by_face[1][place])
        if block.near[place]:
            kept = np.flatnonzero(stays[:place])
            if len(kept):
                nearest = kept[block.bits[place, kept].argmin()]
                if block.bits[place, nearest] < bits:
                    row, bits = start + int(nearest), int(block.bits[place, nearest])
                nearest = kept[block.cosines[place, kept].argmax()]
                if block.cosines[place, nearest] > cosine:
                    other, cosine = start + int(nearest), float(block.cosines[place, nearest])
        if bits <= self._distance:
            return Duplicate("near_duplicate", row, float(bits))
        return Duplicate("face_duplicate", other, cosine) if cosine >= self._similarity else None

    def _bits(self, rows: Ints) -> npt.NDArray[np.int64]:
        hashes = np.ascontiguousarray(self._hashes[rows])
        words, missing = hashes.view(np.uint64), ~hashes.any(1)
        bits = sum(
            np.bitwise_count(word[:, None] ^ word[None]).astype(np.int64) for word in words.T
        )
        assert isinstance(bits, np.ndarray), "a hash has words"
        bits[missing] = bits[:, missing] = 1 << 30
        return bits

    def _cosines(self, rows: Ints) -> Floats:
        if not np.isfinite(self._similarity):
            return np.zeros((len(rows), len(rows)), np.float32)
        units = self._vectors[rows].astype(np.float32)
        cosines = units @ units.T
        left, right = np.nonzero(cosines >= self._similarity - _ROUNDING)
        cosines[left, right] = similarities(self._vectors, rows[left], rows[right])
        return np.asarray(cosines, np.float32)

    def _nearest_hash(self, rows: Ints) -> tuple[Ints, Ints]:
        row, bits = np.full(len(rows), -1, np.int64), np.full(len(rows), 1 << 30, np.int64)
        hashed = np.flatnonzero(self._hashes[rows].any(1))
        if len(hashed) and len(self._hashed) and self._distance >= 0:
            near = self._by_hash.within(self._hashes[rows[hashed]], self._distance)
            # the closest, then the earliest
            query, first = np.unique(near.query, return_index=True)
            row[hashed[query]], bits[hashed[query]] = (
                self._hashed[near.row[first]],
                near.distance[first],
            )
        return row, bits

    def _nearest_face(self, rows: Ints) -> tuple[Ints, Floats]:
        near = self._by_face.nearest(rows, _CANDIDATES)
        return near.row[:, 0], np.where(near.row[:, 0] < 0, np.float32(-1), near.similarity[:, 0])
