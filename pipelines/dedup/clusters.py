"""Clusters identities by average linkage over nearest neighbours, and assigns the train/val split.

Connected components would join different people in chains (A resembles B, B resembles C). Average
linkage requires a minimum mean cosine between all members of two clusters. For unit vectors that
mean is sum·sum / (size·size), so a cluster needs its vector sum only and no distance matrix,
however many vectors are connected. All pairs of clusters that are each other's nearest merge at
once; for average linkage that gives the same result as merging the nearest pair of all, one at a
time (reciprocal nearest neighbours: Murtagh 1983), provided the neighbour lists hold the pairs that
matter.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipelines.dedup.hashes import Ints
from pipelines.dedup.nearest import Floats, Neighbours, Vectors, near_by_identity

# Cosine from which a vector joins the earliest such vector before clustering starts: otherwise a
# thousand copies would merge one a round.
_NEARLY_EQUAL = 0.98
_BLOCK = 16_384  # edges whose linkage is computed at a time: 67 MB


def cluster(vectors: Vectors, neighbours: Neighbours, min_similarity: float) -> Ints:
    """Returns (N,) int64 labels: for each vector the earliest row of its cluster.

    Clusters merge while the mean cosine between their members is at least `min_similarity` (over
    0). neighbours: of `vectors`; pairs that aren't in it are considered only between clusters
    larger than its k.
    """
    left, right, similarity = _edges(neighbours, min_similarity)
    clusters = _Clusters.of(vectors, np.unique(np.concatenate([left, right])))
    left, right = np.searchsorted(clusters.rows, left), np.searchsorted(clusters.rows, right)
    parent = _nearly_equal_parents(len(clusters.rows), left, right, similarity)
    clusters.merge(np.flatnonzero(parent != np.arange(len(parent))), parent)
    k = neighbours.row.shape[1]
    while len(left):
        clusters.agglomerate(left, right, min_similarity)
        left, right = clusters.edges_of_large(min_similarity, k)
    labels = np.arange(len(vectors))
    labels[clusters.rows] = clusters.rows[clusters.label]
    return labels


def split_of(identity_id: str, share: float, seed: int) -> Literal["train", "val"]:
    """Returns the side of the split for an id (of an identity or a split group), by its hash.

    share: of all ids that are "val", 0 to 1. Depends on the arguments only, so a side never changes
    when other samples are added.
    """
    digest = hashlib.sha256(f"split {seed} {identity_id}".encode()).digest()
    return "val" if int.from_bytes(digest[:8], "big") < share * 2**64 else "train"


def _edges(neighbours: Neighbours, min_similarity: float) -> tuple[Ints, Ints, Floats]:
    """Returns (left, right, similarity), each (E,), with left < right and each pair once."""
    count, k = neighbours.row.shape
    valid = (neighbours.row >= 0) & (neighbours.similarity >= min_similarity)
    query, row = np.repeat(np.arange(count), k)[valid.ravel()], neighbours.row[valid]
    pairs, first = np.unique(
        np.minimum(query, row) * count + np.maximum(query, row), return_index=True
    )
    return pairs // count, pairs % count, neighbours.similarity[valid][first]


def _nearly_equal_parents(count: int, left: Ints, right: Ints, similarity: Floats) -> Ints:
    """Returns (count,): for each vector the earliest one that is nearly equal to it, provided that
    one has no such parent itself; else the vector itself.
    """
    nearly_equal = similarity >= _NEARLY_EQUAL
    itself = np.arange(count)
    earliest = itself.copy()
    np.minimum.at(earliest, right[nearly_equal], left[nearly_equal])
    is_root = earliest == itself
    return np.where(is_root[earliest], earliest, itself)


@dataclass(slots=True)
class _Clusters:
    """A clustering of M of the vectors. A cluster's number is the index of its earliest member in
    `rows`; its sum and size are at that index.
    """

    rows: Ints  # (M,) rows of the vectors, ascending
    label: Ints  # (M,) the cluster of each
    sums: Floats  # (M, D) sum of the members' vectors
    size: Ints  # (M,) number of members

    @classmethod
    def of(cls, vectors: Vectors, rows: Ints) -> _Clusters:
        """Returns one cluster for each of `rows`."""
        sums = np.empty((len(rows), vectors.shape[1]), np.float32)
        for start in range(0, len(rows), _BLOCK):
            sums[start : start + _BLOCK] = vectors[rows[start : start + _BLOCK]]
        return cls(rows, np.arange(len(rows)), sums, np.ones(len(rows), np.int64))

    def agglomerate(self, left: Ints, right: Ints, min_similarity: float) -> None:
        """Merge along the edges for as long as any linkage is at least `min_similarity`."""
        left, right = self._between_clusters(left, right)
        linkage = self._linkage(left, right)
        while True:
            # An edge below the minimum is never needed again: if two clusters have a linkage below
            # it with a third, so has their union.
            valid = linkage >= min_similarity
            left, right, linkage = left[valid], right[valid], linkage[valid]
            if not len(left):
                return
            nearest = self._nearest(left, right, linkage)
            itself = np.arange(len(nearest))
            is_mutual = (nearest >= 0) & (nearest[nearest] == itself)
            absorbed = np.flatnonzero(is_mutual & (nearest < itself))
            self.merge(absorbed, nearest)
            changed = np.zeros(len(self.rows), np.bool_)
            changed[nearest[absorbed]] = changed[absorbed] = True
            stale = changed[left] | changed[right]
            new_left, new_right = self._between_clusters(left[stale], right[stale])
            linkage = np.concatenate([linkage[~stale], self._linkage(new_left, new_right)])
            left = np.concatenate([left[~stale], new_left])
            right = np.concatenate([right[~stale], new_right])

    def merge(self, absorbed: Ints, into: Ints) -> None:
        """Make each cluster of `absorbed` part of the earlier cluster into[absorbed], which must
        not be absorbed itself.
        """
        np.add.at(self.size, into[absorbed], self.size[absorbed])
        order = np.argsort(into[absorbed], kind="stable")
        for start in range(0, len(absorbed), _BLOCK):
            part = absorbed[order[start : start + _BLOCK]]
            np.add.at(self.sums, into[part], self.sums[part])
        target = np.arange(len(self.rows))
        target[absorbed] = into[absorbed]
        self.label = target[self.label]

    def edges_of_large(self, min_similarity: float, k: int) -> tuple[Ints, Ints]:
        """Returns edges (left, right) with sufficient linkage between clusters larger than `k`.

        Their members' k nearest neighbours may all be in their own cluster, so the neighbour lists
        don't connect them to other clusters.
        """
        large = np.flatnonzero((self.label == np.arange(len(self.label))) & (self.size > k))
        if len(large) < 2:
            return large[:0], large[:0]
        means = self.sums[large] / np.linalg.norm(self.sums[large], axis=1, keepdims=True)
        neighbours = near_by_identity(means, min_similarity, min(k, len(large) - 1))
        left, right, _ = _edges(neighbours, min_similarity)
        left, right = large[left], large[right]
        valid = self._linkage(left, right) >= min_similarity
        return left[valid], right[valid]

    def _nearest(self, left: Ints, right: Ints, linkage: Floats) -> Ints:
        """Returns (M,): for each cluster the one with the highest linkage to it, of equal ones the
        earliest; -1 if it has no edge.
        """
        best = np.full(len(self.rows), -np.inf, np.float32)
        np.maximum.at(best, left, linkage)
        np.maximum.at(best, right, linkage)
        nearest = np.full(len(self.rows), len(self.rows), np.int64)
        for one, other in ((left, right), (right, left)):
            ties = linkage == best[one]
            np.minimum.at(nearest, one[ties], other[ties])
        return np.where(nearest < len(self.rows), nearest, -1)

    def _between_clusters(self, left: Ints, right: Ints) -> tuple[Ints, Ints]:
        """Returns the edges between the clusters that the ends now belong to, each once."""
        left, right = self.label[left], self.label[right]
        apart = left != right
        low, high = np.minimum(left, right)[apart], np.maximum(left, right)[apart]
        pairs = np.unique(low * len(self.rows) + high)
        return pairs // len(self.rows), pairs % len(self.rows)

    def _linkage(self, left: Ints, right: Ints) -> Floats:
        """Returns (E,) float32: the mean cosine between the members of two clusters."""
        linkage = np.zeros(len(left), np.float32)
        for start in range(0, len(left), _BLOCK):
            one, other = left[start : start + _BLOCK], right[start : start + _BLOCK]
            dots = np.einsum("ed,ed->e", self.sums[one], self.sums[other])
            linkage[start : start + _BLOCK] = dots / (self.size[one] * self.size[other])
        return linkage
