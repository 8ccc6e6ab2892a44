"""Copies, nearest faces and identities over simulated pictures: `python -m bench.identities --count
500000`.

The vectors are made to be as hard as measured ones: strangers' cosines are spread as those of
MobileStyleGAN's portraits (`python -m bench.copies`: median 0.18, 99 % 0.46, 99.9 % 0.57), those of
one person as ArcFace's are, 0.45 to 0.85. Few people have many pictures (Zipf). Some pictures are
copies.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeVar

import numpy as np
import numpy.typing as npt
import typer

from bench.planning import peak
from pipelines.dedup import (
    Neighbours,
    cluster,
    find_duplicates,
    near_by_hash,
    near_by_identity,
    similarities,
    split_of,
)
from pipelines.dedup.nearest import PROBES

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Ints = npt.NDArray[np.int64]
T = TypeVar("T")

_DIM, _BLOCK = 512, 8192
_COMMON = 0.18  # of strangers' cosines: what all faces share
_LEAST = 0.3  # similarity of the neighbours looked for


@dataclass(frozen=True, slots=True)
class Crowd:
    """person: (N,). original: (N,) the row that a row is a copy of, else itself. hashes (N, 32),
    vectors (N, 512).
    """

    person: Ints
    original: Ints
    hashes: npt.NDArray[np.uint8]
    vectors: Halves


def simulate(count: int, people: int, copies: float, alike: bool, seed: int) -> Crowd:
    """Pictures of `people` (those drawn at all), a share of them `copies` of one before.

    alike: faces have much in common and differ along few directions, as the portraits' do; else
    along all, as if strangers were independent.
    """
    rng = np.random.default_rng(seed)
    weight = np.arange(1, people + 1) ** -0.7
    person = rng.choice(people, count, p=weight / weight.sum())
    original = np.arange(count)
    copied = np.flatnonzero(rng.random(count) < copies)
    copied = copied[copied > 0]
    original[copied] = rng.integers(0, copied)
    while not np.array_equal(original, original[original]):  # a copy of a copy is one of the first
        original = original[original]
    person[copied] = person[original[copied]]
    share_common = _COMMON if alike else 0.0
    axes = np.arange(_DIM, dtype=np.float32)
    spread = np.sqrt((axes + 3) ** -0.7 * np.exp(-axes / 60)) if alike else np.ones_like(axes)
    spread *= np.float32(np.sqrt(1 - share_common)) / np.linalg.norm(spread)
    common = np.zeros(_DIM, np.float32)
    common[-1] = np.sqrt(share_common)
    people_vectors = rng.standard_normal((people, _DIM), np.float32) * spread
    # how much of a picture's face is its person
    own = rng.uniform(0.3, 0.85, count).astype(np.float32)
    vectors = np.empty((count, _DIM), np.float16)
    for start in range(0, count, _BLOCK):
        rows = slice(start, start + _BLOCK)
        share = own[rows, None]
        noise = rng.standard_normal((len(share), _DIM), np.float32) * spread
        vectors[rows] = unit(
            common + np.sqrt(share) * people_vectors[person[rows]] + np.sqrt(1 - share) * noise
        )
    hashes = _hashes(rng, count)
    for row in copied.tolist():
        source = original[row]
        drift = rng.standard_normal(_DIM, np.float32) / np.sqrt(_DIM)
        vectors[row] = unit((vectors[source] + rng.uniform(0.1, 0.3) * drift)[None])[0]
        hashes[row] = hashes[source] ^ np.packbits(rng.random(256) < rng.choice([0.0, 0.01, 0.3]))
    return Crowd(person, original, hashes, vectors)


def unit(vectors: Floats) -> Floats:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def _hashes(rng: np.random.Generator, count: int) -> npt.NDArray[np.uint8]:
    """Strangers' distances as measured: mean 112 bits, about 14 standard deviations' worth of
    spread each way.
    """
    base = rng.standard_normal(256, np.float32) * 0.45
    mix = rng.standard_normal((60, 256), np.float32) / np.sqrt(60)
    found = np.empty((count, 32), np.uint8)
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        found[start : start + size] = np.packbits(
            rng.standard_normal((size, 60), np.float32) @ mix + base > 0, axis=1
        )
    return found


def timed(name: str, work: Callable[[], T]) -> T:
    began = time.perf_counter()
    answer = work()
    print(
        f"{name:<34} {time.perf_counter() - began:>7.1f} s   peak {peak():,.0f} MB so far",
        flush=True,
    )
    return answer


def found_of(crowd: Crowd, near: Neighbours, sample: int, seed: int) -> str:
    """Of the true nearest k of some pictures, the share found: of one person from 0.5 up, of copies
    from 0.95 up.
    """
    k = near.row.shape[1]
    queries = np.random.default_rng(seed).choice(
        len(crowd.person), min(sample, len(crowd.person)), replace=False
    )
    one, cosines = (
        crowd.vectors[queries].astype(np.float32),
        np.empty((len(queries), len(crowd.person)), np.float32),
    )
    for start in range(0, len(crowd.person), _BLOCK):
        rows = slice(start, start + _BLOCK)
        cosines[:, rows] = one @ crowd.vectors[rows].astype(np.float32).T
    cosines[np.arange(len(queries)), queries] = -1
    # row by row: of all at once takes gigabytes
    true = np.stack([np.argpartition(row, -k)[-k:] for row in cosines])
    cosine = np.take_along_axis(cosines, true, 1)
    hit = np.array([np.isin(row, got) for row, got in zip(true, near.row[queries], strict=True)])
    same = crowd.person[true] == crowd.person[queries][:, None]
    kinds = {
        f"any ≥ {_LEAST}": cosine >= _LEAST,
        "same person ≥ 0.5": same & (cosine >= 0.5),
        "≥ 0.95": cosine >= 0.95,
    }
    return ", ".join(
        f"{name}: {hit[kind].mean():.4f} of {kind.sum():,}"
        for name, kind in kinds.items()
        if kind.any()
    )


def agreement(labels: Ints, person: Ints) -> str:
    """Pairwise precision and recall, then B-cubed (the mean over pictures)."""
    label, size = np.unique(labels, return_inverse=True, return_counts=True)[1:]
    who, pictures = np.unique(person, return_inverse=True, return_counts=True)[1:]
    cell, both = np.unique(
        label * (len(pictures) + 1) + who, return_inverse=True, return_counts=True
    )[1:]
    pairs, of_label, of_person = ((n * (n - 1.0) / 2).sum() for n in (both, size, pictures))
    by_label, by_person = (both[cell] / size[label]).mean(), (both[cell] / pictures[who]).mean()
    return (
        f"{pairs / max(of_label, 1):.4f} {pairs / of_person:.4f}   {by_label:.4f} "
        f"{by_person:.4f}   {len(size):,}"
    )


def leak(labels: Ints, person: Ints, share: float) -> str:
    """Share of pictures on the val side, and of them those whose person has pictures on the train
    side.
    """
    sides = {
        label: split_of(f"id-{label}", share, 0) == "val" for label in np.unique(labels).tolist()
    }
    val = np.array([sides[label] for label in labels.tolist()])
    return f"{val.mean():.4f} {np.isin(person[val], person[~val]).mean():.4f}"


def main(
    count: Annotated[int, typer.Option(min=1000, help="Pictures.")] = 500_000,
    people: Annotated[int, typer.Option(help="People; 0: three tenths of the pictures.")] = 0,
    copies: Annotated[float, typer.Option(min=0, max=0.9, help="Share of copies.")] = 0.02,
    alike: Annotated[
        bool, typer.Option(help="Strangers are alike as synthetic portraits are; else independent.")
    ] = True,
    k: Annotated[int, typer.Option(min=1, help="Neighbours of each.")] = 16,
    probes: Annotated[int, typer.Option(min=1, help="Cells searched for each.")] = PROBES,
    min_similarity: Annotated[
        list[float] | None, typer.Option(help="Of clusters; as often as wanted.")
    ] = None,
    sample: Annotated[
        int, typer.Option(min=1, help="Pictures whose true neighbours are counted.")
    ] = 500,
    seed: Annotated[int, typer.Option(help="Of the simulation.")] = 0,
) -> None:
    """Print what each step takes and finds."""
    crowd = timed(
        f"simulated {count:,}",
        lambda: simulate(count, people or 3 * count // 10, copies, alike, seed),
    )
    rng = np.random.default_rng(seed)
    one, other = rng.integers(0, count, (2, 1_000_000))
    cosines, apart = (
        similarities(crowd.vectors, one, other),
        crowd.person[one] != crowd.person[other],
    )
    print(
        "  strangers, cosine 50, 99, 99.9 %, largest:",
        np.quantile(cosines[apart], [0.5, 0.99, 0.999, 1]).round(3),
    )
    order = np.argsort(crowd.person, kind="stable")
    own = crowd.person[order[:-1]] == crowd.person[order[1:]]
    cosines = similarities(crowd.vectors, order[:-1][own], order[1:][own])
    print("  one person, cosine 5, 50, 95 %:", np.quantile(cosines, [0.05, 0.5, 0.95]).round(3))
    pairs = timed("near_by_hash, 10 bits", lambda: near_by_hash(crowd.hashes, 10))
    print(f"  {len(pairs.left):,} pairs of {len(np.unique(pairs.first)):,} different hashes")
    gone = timed(
        "find_duplicates",
        lambda: find_duplicates([""] * count, crowd.hashes, crowd.vectors, 10, 0.95),
    )
    copied = crowd.original != np.arange(count)
    close = copied & (similarities(crowd.vectors, np.arange(count), crowd.original) >= 0.95)
    is_gone = np.isin(np.arange(count), list(gone))
    print(
        f"  dropped {is_gone[close].mean():.4f} of {close.sum():,} copies, "
        f"{is_gone[~copied].sum()} that are none"
    )
    kept = ~is_gone
    near = timed(
        f"near_by_identity, k={k}",
        lambda: near_by_identity(crowd.vectors, _LEAST, k, probes=probes),
    )
    print("  found " + found_of(crowd, near, sample, seed))
    print("  clusters: precision, recall of pairs; B-cubed; identities; of val, its leak")
    for least in min_similarity or (0.5, 0.55, 0.6):
        labels = timed(f"cluster, {least}", lambda least=least: cluster(crowd.vectors, near, least))  # type: ignore[misc]
        part = (
            f"{agreement(labels[kept], crowd.person[kept])}   "
            f"{leak(labels[kept], crowd.person[kept], 0.02)}"
        )
        print("  " + part, flush=True)


if __name__ == "__main__":
    typer.run(main)
