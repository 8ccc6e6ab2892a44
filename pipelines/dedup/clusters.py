"""Identities: which vectors are one person, by average linkage over the nearest neighbours; and the
split by person.

Connected components would chain strangers together (A looks like B, B like C). Average linkage asks
that all of one cluster be like all of another on average. For unit vectors that average is sum·sum
/ (size·size), so a cluster needs its sum alone, and no matrix of distances: no component is too
large. All pairs that are nearest to each other merge at once; for average linkage that comes to the
same as merging the nearest pair of all, one at a time (reciprocal nearest neighbours: Murtagh
1983), as far as the neighbours given hold the pairs that matter.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipelines.dedup.hashes import Ints
from pipelines.dedup.nearest import Floats, Neighbours, Vectors, near_by_identity

# at once with the earliest that is so near: a thousand copies would merge one in each round
_COPY = 0.98
_BLOCK = 16_384  # edges whose linkage is computed at a time: 67 MB


def cluster(vectors: Vectors, neighbours: Neighbours, min_similarity: float) -> Ints:
    """(N,) labels: for each vector the earliest row of its cluster.

    Clusters merge while the mean cosine between their members is at least `min_similarity` (over
    0).
    """
    left, right, similarity = _edges(neighbours, min_similarity)
    clusters = _Clusters.of(vectors, np.unique(np.concatenate([left, right])))
    left, right = np.searchsorted(clusters.rows, left), np.searchsorted(clusters.rows, right)
    parent = _leaders(len(clusters.rows), left, right, similarity)
    clusters.merge(np.flatnonzero(parent != np.arange(len(parent))), parent)
    k = neighbours.row.shape[1]
    while len(left):
        clusters.agglomerate(left, right, min_similarity)
        left, right = clusters.bridges(min_similarity, k)
    labels = np.arange(len(vectors))
    labels[clusters.rows] = clusters.rows[clusters.label]
    return labels


def split_of(identity_id: str, share: float, seed: int) -> Literal["train", "val"]:
    """The side of an identity, from its id alone: about `share` of all are on "val"."""
    digest = hashlib.sha256(f"split {seed} {identity_id}".encode()).digest()
    return "val" if int.from_bytes(digest[:8], "big") < share * 2**64 else "train"


def _edges(neighbours: Neighbours, min_similarity: float) -> tuple[Ints, Ints, Floats]:
    """(left, right, similarity) with left < right, each pair once."""
    count, k = neighbours.row.shape
    good = (neighbours.row >= 0) & (neighbours.similarity >= min_similarity)
    query, row = np.repeat(np.arange(count), k)[good.ravel()], neighbours.row[good]
    pairs, first = np.unique(
        np.minimum(query, row) * count + np.maximum(query, row), return_index=True
    )
    return pairs // count, pairs % count, neighbours.similarity[good][first]


def _leaders(count: int, left: Ints, right: Ints, similarity: Floats) -> Ints:
    """(count,) for each the earliest that is near enough to be a copy of it and not a copy itself,
    else itself.
    """
    near = similarity >= _COPY
    lowest = np.arange(count)
    np.minimum.at(lowest, right[near], left[near])
    leads = lowest == np.arange(count)
    return np.where(leads[lowest], lowest, np.arange(count))


@dataclass(slots=True)
class _Clusters:
    """Clusters of `rows`, known by the place of their earliest member in it; sum and size stand at
    that place.
    """

    rows: Ints  # (M,) of the vectors, ascending
    label: Ints  # (M,)
    sums: Floats  # (M, D)
    size: Ints  # (M,)

    @classmethod
    def of(cls, vectors: Vectors, rows: Ints) -> _Clusters:
        sums = np.empty((len(rows), vectors.shape[1]), np.float32)
        for start in range(0, len(rows), _BLOCK):
            sums[start : start + _BLOCK] = vectors[rows[start : start + _BLOCK]]
        return cls(rows, np.arange(len(rows)), sums, np.ones(len(rows), np.int64))

    def agglomerate(self, left: Ints, right: Ints, least: float) -> None:
        """Merge along the edges for as long as any linkage is at least `least`."""
        left, right = self._renamed(left, right)
        linkage = self._linkage(left, right)
        while True:
            # of two linkages under it the mean is too: such an edge is never needed again
            good = linkage >= least
            left, right, linkage = left[good], right[good], linkage[good]
            if not len(left):
                return
            nearest = self._nearest(left, right, linkage)
            own = np.arange(len(nearest))
            gone = np.flatnonzero((nearest >= 0) & (nearest[nearest] == own) & (nearest < own))
            self.merge(gone, nearest)
            changed = np.zeros(len(self.rows), np.bool_)
            changed[nearest[gone]] = changed[gone] = True
            stale = changed[left] | changed[right]
            fresh = self._renamed(left[stale], right[stale])
            linkage = np.concatenate([linkage[~stale], self._linkage(*fresh)])
            left, right = (
                np.concatenate([left[~stale], fresh[0]]),
                np.concatenate([right[~stale], fresh[1]]),
            )

    def merge(self, gone: Ints, into: Ints) -> None:
        """Each cluster of `gone` becomes part of the earlier one into[gone], which isn't gone
        itself.
        """
        np.add.at(self.size, into[gone], self.size[gone])
        order = np.argsort(into[gone], kind="stable")
        for start in range(0, len(gone), _BLOCK):
            part = gone[order[start : start + _BLOCK]]
            np.add.at(self.sums, into[part], self.sums[part])
        target = np.arange(len(self.rows))
        target[gone] = into[gone]
        self.label = target[self.label]

    def bridges(self, least: float, k: int) -> tuple[Ints, Ints]:
        """Edges between clusters larger than `k`, whose members' nearest may all be in their own
        cluster.
        """
        large = np.flatnonzero((self.label == np.arange(len(self.label))) & (self.size > k))
        if len(large) < 2:
            return large[:0], large[:0]
        means = self.sums[large] / np.linalg.norm(self.sums[large], axis=1, keepdims=True)
        left, right, _ = _edges(near_by_identity(means, least, min(k, len(large) - 1)), least)
        left, right = large[left], large[right]
        good = self._linkage(left, right) >= least
        return left[good], right[good]

    def _nearest(self, left: Ints, right: Ints, linkage: Floats) -> Ints:
        """(M,) the cluster with the highest linkage to each, of equals the earliest; -1 where there
        is none.
        """
        best = np.full(len(self.rows), -np.inf, np.float32)
        np.maximum.at(best, left, linkage)
        np.maximum.at(best, right, linkage)
        nearest = np.full(len(self.rows), len(self.rows), np.int64)
        for one, other in ((left, right), (right, left)):
            ties = linkage == best[one]
            np.minimum.at(nearest, one[ties], other[ties])
        return np.where(nearest < len(self.rows), nearest, -1)

    def _renamed(self, left: Ints, right: Ints) -> tuple[Ints, Ints]:
        """The edges between the clusters that their ends belong to now, each once."""
        left, right = self.label[left], self.label[right]
        apart = left != right
        low, high = np.minimum(left, right)[apart], np.maximum(left, right)[apart]
        pairs = np.unique(low * len(self.rows) + high)
        return pairs // len(self.rows), pairs % len(self.rows)

    def _linkage(self, left: Ints, right: Ints) -> Floats:
        """(E,) mean cosine between the members of two clusters."""
        found = np.zeros(len(left), np.float32)
        for start in range(0, len(left), _BLOCK):
            one, other = left[start : start + _BLOCK], right[start : start + _BLOCK]
            dots = np.einsum("ed,ed->e", self.sums[one], self.sums[other])
            found[start : start + _BLOCK] = dots / (self.size[one] * self.size[other])
        return found
