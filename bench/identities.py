"""Speed and quality of the global pass on simulated images: `python -m bench.identities`.

It measures near duplicates, nearest faces and identity clusters. The simulated embeddings are as
hard to separate as measured ones: cosines of different people have the distribution of
MobileStyleGAN's portraits (`python -m bench.copies`: median 0.18, 99 % 0.46, 99.9 % 0.57), those of
one person that of ArcFace, 0.45 to 0.85. A few people have many images (Zipf). Some images are
copies of others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, TypeVar

import numpy as np
import numpy.typing as npt
import typer

from bench.memory import peak
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
_COMMON = 0.18  # mean cosine between different people
_MIN_COSINE = 0.3  # of the neighbours searched for


@dataclass(frozen=True, slots=True)
class Crowd:
    """N simulated images.

    person: (N,). original: (N,), the row that an image is a copy of, or its own. hashes: (N, 32).
    vectors: (N, 512), unit embeddings.
    """

    person: Ints
    original: Ints
    hashes: npt.NDArray[np.uint8]
    vectors: Halves


def simulate(count: int, people: int, copies: float, alike: bool, seed: int) -> Crowd:
    """Simulates `count` images of at most `people` people; the share `copies` are copies of others.

    alike: whether embeddings have a common component and differ mainly along few directions, as
    those of the portraits; otherwise different people are independent.
    """
    rng = np.random.default_rng(seed)
    weight = np.arange(1, people + 1) ** -0.7
    person = rng.choice(people, count, p=weight / weight.sum())
    original = np.arange(count)
    copied = np.flatnonzero(rng.random(count) < copies)
    copied = copied[copied > 0]
    original[copied] = rng.integers(0, copied)
    while not np.array_equal(original, original[original]):  # follow copies of copies to the first
        original = original[original]
    person[copied] = person[original[copied]]
    share_common = _COMMON if alike else 0.0
    axes = np.arange(_DIM, dtype=np.float32)
    spread = np.sqrt((axes + 3) ** -0.7 * np.exp(-axes / 60)) if alike else np.ones_like(axes)
    spread *= np.float32(np.sqrt(1 - share_common)) / np.linalg.norm(spread)
    common = np.zeros(_DIM, np.float32)
    common[-1] = np.sqrt(share_common)
    people_vectors = rng.standard_normal((people, _DIM), np.float32) * spread
    # the share of an image's vector that is its person's, as against noise
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
    """Simulates hashes with distances as measured: mean 112 bits, standard deviation about 14."""
    base = rng.standard_normal(256, np.float32) * 0.45
    mix = rng.standard_normal((60, 256), np.float32) / np.sqrt(60)
    hashes = np.empty((count, 32), np.uint8)
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        hashes[start : start + size] = np.packbits(
            rng.standard_normal((size, 60), np.float32) @ mix + base > 0, axis=1
        )
    return hashes


def timed(name: str, function: Callable[[], T]) -> T:
    """Calls a function, prints its time and the process's peak memory, and returns its result."""
    started = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - started
    print(f"{name:<34} {seconds:>7.1f} s   peak {peak():,.0f} MB so far", flush=True)
    return result


def recall(crowd: Crowd, near: Neighbours, sample: int, seed: int) -> str:
    """Returns the share of the true k nearest neighbours in `near`, for `sample` random images.

    Also separately for neighbours of the same person from cosine 0.5 and for all from 0.95.
    """
    k = near.row.shape[1]
    queries = np.random.default_rng(seed).choice(
        len(crowd.person), min(sample, len(crowd.person)), replace=False
    )
    query_vectors = crowd.vectors[queries].astype(np.float32)
    cosines = np.empty((len(queries), len(crowd.person)), np.float32)
    for start in range(0, len(crowd.person), _BLOCK):
        rows = slice(start, start + _BLOCK)
        cosines[:, rows] = query_vectors @ crowd.vectors[rows].astype(np.float32).T
    cosines[np.arange(len(queries)), queries] = -1
    # row by row, because argpartition of the whole array takes gigabytes
    true = np.stack([np.argpartition(row, -k)[-k:] for row in cosines])
    cosine = np.take_along_axis(cosines, true, 1)
    hit = np.array([np.isin(row, rows) for row, rows in zip(true, near.row[queries], strict=True)])
    same = crowd.person[true] == crowd.person[queries][:, None]
    kinds = {
        f"any ≥ {_MIN_COSINE}": cosine >= _MIN_COSINE,
        "same person ≥ 0.5": same & (cosine >= 0.5),
        "≥ 0.95": cosine >= 0.95,
    }
    return ", ".join(
        f"{name}: {hit[kind].mean():.4f} of {kind.sum():,}"
        for name, kind in kinds.items()
        if kind.any()
    )


def agreement(labels: Ints, person: Ints) -> str:
    """Compares cluster labels with people, both (N,).

    Returns precision and recall over pairs, then B-cubed precision and recall (means over images),
    then the number of clusters.
    """
    cluster_of, cluster_size = np.unique(labels, return_inverse=True, return_counts=True)[1:]
    person_of, person_size = np.unique(person, return_inverse=True, return_counts=True)[1:]
    cell_of, cell_size = np.unique(
        cluster_of * (len(person_size) + 1) + person_of, return_inverse=True, return_counts=True
    )[1:]
    pairs, cluster_pairs, person_pairs = (
        (n * (n - 1.0) / 2).sum() for n in (cell_size, cluster_size, person_size)
    )
    precision = (cell_size[cell_of] / cluster_size[cluster_of]).mean()
    recall = (cell_size[cell_of] / person_size[person_of]).mean()
    return (
        f"{pairs / max(cluster_pairs, 1):.4f} {pairs / person_pairs:.4f}   "
        f"{precision:.4f} {recall:.4f}   {len(cluster_size):,}"
    )


def leak(labels: Ints, person: Ints, share: float) -> str:
    """Returns the share of val images, and the share of these whose person has train images."""
    sides = {
        label: split_of(f"id-{label}", share, 0) == "val" for label in np.unique(labels).tolist()
    }
    val = np.array([sides[label] for label in labels.tolist()])
    return f"{val.mean():.4f} {np.isin(person[val], person[~val]).mean():.4f}"


def main(
    count: Annotated[int, typer.Option(min=1000, help="Images.")] = 500_000,
    people: Annotated[int, typer.Option(help="People; 0: three tenths of the images.")] = 0,
    copies: Annotated[float, typer.Option(min=0, max=0.9, help="Share of copies.")] = 0.02,
    alike: Annotated[
        bool, typer.Option(help="Different people are as similar as synthetic portraits.")
    ] = True,
    k: Annotated[int, typer.Option(min=1, help="Neighbours of each image.")] = 16,
    probes: Annotated[int, typer.Option(min=1, help="Index cells searched for each.")] = PROBES,
    min_similarity: Annotated[
        list[float] | None, typer.Option(help="Of a cluster. Repeat it for several values.")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Images for which recall is measured.")] = 500,
    seed: Annotated[int, typer.Option(help="Seed of the simulation.")] = 0,
) -> None:
    """Print the time, the memory and the quality of each step."""
    crowd = timed(
        f"simulated {count:,}",
        lambda: simulate(count, people or 3 * count // 10, copies, alike, seed),
    )
    rng = np.random.default_rng(seed)
    left, right = rng.integers(0, count, (2, 1_000_000))
    cosines = similarities(crowd.vectors, left, right)
    different = crowd.person[left] != crowd.person[right]
    print(
        "  different people, cosine 50, 99, 99.9 %, largest:",
        np.quantile(cosines[different], [0.5, 0.99, 0.999, 1]).round(3),
    )
    order = np.argsort(crowd.person, kind="stable")
    same = crowd.person[order[:-1]] == crowd.person[order[1:]]
    cosines = similarities(crowd.vectors, order[:-1][same], order[1:][same])
    print("  one person, cosine 5, 50, 95 %:", np.quantile(cosines, [0.05, 0.5, 0.95]).round(3))
    pairs = timed("near_by_hash, 10 bits", lambda: near_by_hash(crowd.hashes, 10))
    print(f"  {len(pairs.left):,} pairs of {len(np.unique(pairs.first)):,} different hashes")
    duplicates = timed(
        "find_duplicates",
        lambda: find_duplicates([""] * count, crowd.hashes, crowd.vectors, 10, 0.95),
    )
    is_copy = crowd.original != np.arange(count)
    is_close = is_copy & (similarities(crowd.vectors, np.arange(count), crowd.original) >= 0.95)
    dropped = np.isin(np.arange(count), list(duplicates))
    print(
        f"  dropped {dropped[is_close].mean():.4f} of {is_close.sum():,} copies, and "
        f"{dropped[~is_copy].sum()} images that are not copies"
    )
    near = timed(
        f"near_by_identity, k={k}",
        lambda: near_by_identity(crowd.vectors, _MIN_COSINE, k, probes=probes),
    )
    print("  recall " + recall(crowd, near, sample, seed))
    print("  clusters: precision, recall over pairs; B-cubed; clusters; share of val, its leak")
    for minimum in min_similarity or (0.5, 0.55, 0.6):
        labels = timed(f"cluster, {minimum}", partial(cluster, crowd.vectors, near, minimum))
        row = (
            f"{agreement(labels[~dropped], crowd.person[~dropped])}   "
            f"{leak(labels[~dropped], crowd.person[~dropped], 0.02)}"
        )
        print("  " + row, flush=True)


if __name__ == "__main__":
    typer.run(main)
