"""Recall and false matches of take-downs by photograph, from embeddings of labelled photographs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Final

import numpy as np
import numpy.typing as npt

from stages.backends.same_person import upper_bound

Floats = npt.NDArray[np.float32]

THRESHOLDS: Final = tuple(round(0.2 + 0.05 * step, 2) for step in range(11))  # 0.20 to 0.70
_MOST_SETS: Final = 500  # sets of photographs of one person that are used as queries


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Of one threshold. queries: sets of photographs that were used as queries, of people with
    further photographs. recall: mean share of a person's further photographs that a query finds.
    complete: share of the queries that find all of them. false: number of the `pairs` of
    photographs of different people that match. bound: upper bound of their share, see
    `same_person.upper_bound`.
    """

    cosine: float
    queries: int
    recall: float
    complete: float
    false: int
    pairs: int
    bound: float


def rates(
    vectors: Floats, people: Sequence[str], photos: int, cosines: Sequence[float] = THRESHOLDS
) -> list[Rates]:
    """Returns the rates of each threshold in `cosines`.

    vectors: (N, D), unit norm. people: the N people shown. photos: photographs of a query; a face
    matches if it is like one of them. At most _MOST_SETS queries of each person are made.
    """
    labels = np.unique(np.asarray(people), return_inverse=True)[1]
    limits = np.asarray(cosines)
    shares = [
        (np.max(vectors[list(query)] @ vectors[others].T, axis=0)[:, None] >= limits).mean(axis=0)
        for query, others in _queries(labels, photos)
    ]
    matched = np.asarray(shares).reshape(-1, len(limits))
    false, pairs = _false(vectors, labels, limits)
    none = not len(matched)
    return [
        Rates(
            cosine=cosine,
            queries=len(matched),
            recall=np.nan if none else float(matched[:, at].mean()),
            complete=np.nan if none else float((matched[:, at] == 1).mean()),
            false=int(false[at]),
            pairs=pairs,
            bound=upper_bound(int(false[at]), pairs),
        )
        for at, cosine in enumerate(cosines)
    ]


def _queries(
    labels: npt.NDArray[np.int64], photos: int
) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """Yields rows of each query, and of the person's other photographs."""
    for label in range(labels.max(initial=-1) + 1):
        rows = np.flatnonzero(labels == label).tolist()
        if len(rows) > photos:
            for query in islice(combinations(rows, photos), _MOST_SETS):
                yield query, [row for row in rows if row not in query]


def _false(
    vectors: Floats, labels: npt.NDArray[np.int64], limits: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], int]:
    """Returns the number of matching pairs of different people by threshold, and of all such
    pairs.
    """
    false, pairs = np.zeros(len(limits), np.int64), 0
    for row in range(len(vectors)):
        strangers = vectors[:row][labels[:row] != labels[row]]
        cosines = np.sort(strangers @ vectors[row])
        false += len(cosines) - np.searchsorted(cosines, limits)
        pairs += len(cosines)
    return false, pairs


def table(lines: Sequence[Rates]) -> Iterator[str]:
    """Yields the lines of a table."""
    yield "cosine   recall   complete   false matches of strangers   at most (95 %)"
    for line in lines:
        false = f"{line.false:,} of {line.pairs:,}"
        yield (
            f"{line.cosine:>6.2f}{line.recall:>8.1%}{line.complete:>10.1%}   {false:>24}"
            f"{line.bound:>17.3g}"
        )
