"""Duplicates, identities and the split: compared with brute force, and with many equal samples and
chains of similar samples, which are hard for clustering.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from pipelines.dedup import (
    Duplicate,
    cluster,
    find_duplicates,
    near_by_hash,
    near_by_identity,
    search_hashes,
    similarities,
    split_of,
)
from pipelines.dedup.hashes import Hashes
from pipelines.dedup.nearest import Floats

NO_HASHES = np.zeros((0, 32), np.uint8)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores faiss's number of threads after a test that changes it."""
    count = faiss.omp_get_max_threads()
    yield
    faiss.omp_set_num_threads(count)


def unit(vectors: Floats) -> Floats:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def crowd(
    people: int, each: int, noise: float, seed: int = 0, dim: int = 64
) -> tuple[Floats, np.ndarray]:
    """Returns (vectors, person of each), shuffled; `each` vectors of every person, whose cosines
    are about 1 / (1 + noise²).
    """
    rng = np.random.default_rng(seed)
    person = rng.permutation(np.repeat(np.arange(people), each))
    centres = unit(rng.standard_normal((people, dim)))
    offsets = noise * rng.standard_normal((len(person), dim)) / np.sqrt(dim)
    return unit(centres[person] + offsets), person


def near_hashes(count: int, seed: int = 0) -> Hashes:
    """Random hashes, every second one a few bits from an earlier one; some are equal."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 256, (count, 32), np.uint8)
    for row in range(1, count, 2):
        flips = rng.permutation(np.arange(256) < rng.integers(0, 9))
        hashes[row] = hashes[rng.integers(0, row)] ^ np.packbits(flips)
    return hashes


def bits(left: Hashes, right: Hashes) -> np.ndarray:
    return np.bitwise_count(left[:, None] ^ right[None]).sum(-1, dtype=np.int64)


def test_pairs_of_hashes_equal_brute_force() -> None:
    hashes = near_hashes(900)
    distance = bits(hashes, hashes)
    first = (distance == 0).argmax(1)
    own = np.flatnonzero(first == np.arange(len(hashes)))
    assert len(own) < len(hashes), "some are equal"
    for max_distance in (0, 1, 4, 10):
        pairs = near_by_hash(hashes, max_distance, block_rows=256)
        left, right = np.nonzero(np.triu(distance[np.ix_(own, own)] <= max_distance, 1))
        assert (len(left) > 0) == (max_distance > 0), "pairs of different hashes, none at 0 bits"
        assert (pairs.first == first).all()
        assert pairs.left.tolist() == own[left].tolist()
        assert pairs.right.tolist() == own[right].tolist()
        assert (pairs.distance == distance[pairs.left, pairs.right]).all()


def test_ten_thousand_equal_hashes_are_one_group() -> None:
    hashes = np.full((10_001, 32), 7, np.uint8)
    hashes[4000, 0] ^= 1
    pairs = near_by_hash(hashes, 10)
    assert [column.tolist() for column in pairs[1:]] == [[0], [4000], [1]]
    assert np.flatnonzero(pairs.first).tolist() == [4000]


def test_matches_of_a_hash_are_sorted_by_distance() -> None:
    hashes = near_hashes(300)
    matches = search_hashes(hashes[5:8], hashes, 12)
    distance = bits(hashes[5:8], hashes)
    expected = [(q, d, r) for q in range(3) for r, d in enumerate(distance[q].tolist()) if d <= 12]
    assert list(zip(matches.query, matches.distance, matches.row, strict=True)) == sorted(expected)
    assert len(expected) > 3


def test_no_hashes_have_no_pairs() -> None:
    assert all(not len(column) for column in near_by_hash(NO_HASHES, 10))
    assert all(not len(column) for column in search_hashes(NO_HASHES, near_hashes(3), 10))


@pytest.mark.parametrize(("min_similarity", "k"), [(0.5, 5), (0.2, 40), (0.999, 3)])
def test_neighbours_of_few_vectors_are_exact(min_similarity: float, k: int) -> None:
    vectors, _ = crowd(60, 25, 0.9)
    neighbours = near_by_identity(vectors, min_similarity, k)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1)
    expected = -np.sort(-cosines, axis=1)[:, :k]
    expected = np.where(expected >= min_similarity, expected, 0)
    assert np.abs(neighbours.similarity - expected).max() < 1e-5
    query, place = np.nonzero(neighbours.row >= 0)
    assert ((neighbours.row >= 0) == (expected > 0)).all()
    row = neighbours.row[query, place]
    assert (query != row).all()
    assert (neighbours.similarity[query, place] == similarities(vectors, query, row)).all()


def test_the_index_finds_nearly_all_neighbours_with_exact_similarities(tmp_path: Path) -> None:
    vectors, _ = crowd(1500, 4, 0.8)
    stored = np.memmap(tmp_path / "vectors", np.float16, "w+", shape=vectors.shape)
    stored[:] = vectors
    exact = near_by_identity(stored, 0.5, 3)
    indexed = near_by_identity(stored, 0.5, 3, exact_rows=1000, probes=14)
    exists = exact.row >= 0
    hit = np.array([np.isin(a, b) for a, b in zip(exact.row, indexed.row, strict=True)])
    assert exists.sum() > 10_000
    assert 0.95 < hit[exists].mean() < 1, (
        "14 of 24 cells are searched: nearly all are found; if all are, the index wasn't used"
    )
    query, place = np.nonzero(indexed.row >= 0)
    cosines = similarities(stored, query, indexed.row[query, place])
    assert (indexed.similarity[query, place] == cosines).all()


@pytest.mark.parametrize("exact_rows", [30_000, 500], ids=["exact", "index"])
def test_neighbours_do_not_depend_on_threads(exact_rows: int, threads: None) -> None:
    vectors, _ = crowd(500, 3, 0.8, dim=200)
    results = []
    for count in (1, 2, 2):
        faiss.omp_set_num_threads(count)
        results.append(near_by_identity(vectors, 0.3, 8, exact_rows=exact_rows))
    for result in results[1:]:
        assert (result.row == results[0].row).all()
        assert (result.similarity == results[0].similarity).all()


def test_a_vector_of_zeros_has_no_neighbours() -> None:
    vectors, _ = crowd(3, 3, 0.1)
    vectors[[2, 5]] = 0
    row = near_by_identity(vectors, 0.01, 8).row
    assert (row[[2, 5]] == -1).all() and not np.isin(row, [2, 5]).any()


def test_a_minimum_similarity_of_zero_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected over 0"):
        near_by_identity(np.eye(3, dtype=np.float32), 0, 1)


def clustered(vectors: Floats, min_similarity: float, k: int) -> np.ndarray:
    return cluster(vectors, near_by_identity(vectors, min_similarity, k), min_similarity)


@pytest.mark.parametrize("min_similarity", [0.3, 0.45, 0.6])
@pytest.mark.parametrize("noise", [0.6, 1.2])
def test_clusters_equal_average_linkage_of_scipy(min_similarity: float, noise: float) -> None:
    vectors, _ = crowd(40, 8, noise, dim=24)  # in few dimensions different people are similar
    labels = clustered(vectors, min_similarity, len(vectors) - 1)
    distance = 1 - vectors.astype(np.float64) @ vectors.T
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average")
    expected = fcluster(tree, 1 - min_similarity, "distance")
    first = {label: row for row, label in reversed(list(enumerate(expected.tolist())))}
    assert labels.tolist() == [first[label] for label in expected.tolist()], (
        "a label is the cluster's earliest member"
    )
    assert 1 < len(first) < len(vectors)


@pytest.mark.parametrize("degrees", [50.0, 9.0])  # cosine 0.64, and 0.988 as of near duplicates
def test_a_chain_is_not_one_identity(degrees: float) -> None:
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    vectors = np.zeros((24, 48), np.float32)
    vectors[0, 0] = 1
    for row in range(1, 24):  # each is rotated from the one before into a new dimension
        vectors[row] = vectors[row - 1] * cosine
        vectors[row, row] = sine
    assert np.allclose(similarities(vectors, np.arange(23), np.arange(1, 24)), cosine, atol=1e-5)
    min_similarity = cosine - 0.04
    labels = clustered(vectors, min_similarity, 23)
    assert len(np.unique(labels)) > 4 and labels[0] != labels[-1]
    assert (labels[labels] == labels).all(), "a label is a member of its cluster"
    for label in np.unique(labels):
        members = vectors[labels == label]
        pairs = (members @ members.T)[np.triu_indices(len(members), 1)]
        assert not len(pairs) or pairs.mean() >= min_similarity - 1e-4


def test_clusters_merge_even_if_all_neighbours_are_in_the_same_cluster() -> None:
    rng = np.random.default_rng(0)
    sessions = unit(np.array([[1, 0.6], [1, -0.6]]) @ np.eye(2, 64))
    vectors = unit(np.repeat(sessions, 60, 0) + 0.03 * rng.standard_normal((120, 64)))
    near = near_by_identity(vectors, 0.4, 8)
    same_session = (near.row < 60) == (np.arange(120) < 60)[:, None]
    assert same_session.all(), "the test needs neighbours that don't connect the sessions"
    assert not cluster(vectors, near, 0.4).any()


def test_thousands_of_equal_vectors_are_one_identity() -> None:
    equal = np.tile(np.eye(1, 64, dtype=np.float32), (4000, 1))
    vectors = np.concatenate([equal, np.eye(2, 64, 5, np.float32)])
    labels = clustered(vectors, 0.5, 16)
    assert not labels[:4000].any() and labels[4000:].tolist() == [4000, 4001]


def test_clusters_separate_people_with_neighbours_from_the_index() -> None:
    vectors, person = crowd(300, 6, 0.6, dim=256)
    near = near_by_identity(vectors, 0.3, 8, exact_rows=500, probes=4)
    labels = cluster(vectors, near, 0.45)
    same = person[:, None] == person
    assert ((labels[:, None] == labels) & ~same).sum() == 0
    assert ((labels[:, None] == labels) & same).sum() > 0.99 * same.sum()
    assert (labels == cluster(vectors, near, 0.45)).all()


def test_no_vectors_have_no_labels() -> None:
    assert clustered(np.zeros((0, 8), np.float32), 0.5, 4).tolist() == []
    assert clustered(np.eye(3, 8, dtype=np.float32), 0.5, 2).tolist() == [0, 1, 2]


def test_the_split_depends_on_the_id_only() -> None:
    ids = [f"id-{number:012x}" for number in range(20_000)]
    sides = [split_of(one, 0.02, 0) for one in ids]
    assert 300 < sides.count("val") < 500
    assert [i for i, side in enumerate(sides) if side == "val"][:4] == PINNED, (
        "the split of existing data sets would change"
    )
    assert sides != [split_of(one, 0.02, 1) for one in ids]
    larger = [split_of(one, 0.05, 0) for one in ids]
    in_larger = [large for side, large in zip(sides, larger, strict=True) if side == "val"]
    assert set(in_larger) == {"val"}, "a larger share only adds to val"
    assert {split_of(one, 0, 0) for one in ids} == {"train"}
    assert {split_of(one, 1, 0) for one in ids} == {"val"}


PINNED = [82, 120, 160, 178]


def brute_force(
    digests: list[str], hashes: Hashes, vectors: Floats, max_distance: int, max_similarity: float
) -> dict[int, Duplicate]:
    """Returns what `find_duplicates` returns, by comparing each row with all earlier ones."""
    unique_rows: list[int] = []
    duplicates = {}
    for row, digest in enumerate(digests):
        equal = [other for other in unique_rows if digest and digests[other] == digest]
        distances = [
            (int(bits(hashes[[row]], hashes[[other]])[0, 0]), other)
            for other in unique_rows
            if hashes[other].any()
        ]
        cosines = [
            (float(similarities(vectors, np.array([row]), np.array([other]))[0]), -other)
            for other in unique_rows
        ]
        nearest_hash, nearest_face = min(distances, default=None), max(cosines, default=None)
        if equal:
            duplicates[row] = Duplicate("duplicate", equal[0], 0.0)
        elif hashes[row].any() and nearest_hash and nearest_hash[0] <= max_distance:
            duplicates[row] = Duplicate("near_duplicate", nearest_hash[1], float(nearest_hash[0]))
        elif max_similarity and nearest_face and nearest_face[0] >= max_similarity:
            duplicates[row] = Duplicate("face_duplicate", -nearest_face[1], nearest_face[0])
        else:
            unique_rows.append(row)
    return duplicates


def samples(count: int, seed: int) -> tuple[list[str], Hashes, Floats]:
    """Returns (sha256s, hashes, vectors), chosen from few, so that every reason and many ties
    occur; some samples lack a digest, hash or face.
    """
    rng = np.random.default_rng(seed)
    hashes = np.concatenate([np.zeros((1, 32), np.uint8), near_hashes(max(2, count // 3), seed)])
    pairs = unit(np.repeat(rng.standard_normal((max(2, count // 5), 16)), 2, 0))
    faces = unit(pairs + 0.08 * rng.standard_normal(pairs.shape))
    faces = np.concatenate([np.zeros((1, 16), np.float32), faces])
    digests = np.array(["", *(f"{number:064x}" for number in range(count * 2))])
    picked = rng.integers(0, len(hashes), count), rng.integers(0, len(faces), count)
    picked_digests = digests[rng.integers(0, len(digests), count)].tolist()
    return picked_digests, hashes[picked[0]], faces[picked[1]]


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 60),
    seed=st.integers(0, 10_000),
    max_distance=st.integers(-1, 12),
    max_similarity=st.sampled_from([0, 0.9]),
)
def test_duplicates_equal_brute_force(
    count: int, seed: int, max_distance: int, max_similarity: float
) -> None:
    arguments = (*samples(count, seed), max_distance, max_similarity)
    expected = brute_force(*arguments)
    for block_rows in (7, 1024):
        assert find_duplicates(*arguments, block_rows=block_rows) == expected


def test_every_reason_occurs() -> None:
    duplicates = find_duplicates(*samples(60, 1), 6, 0.9)
    reasons = {duplicate.reason for duplicate in duplicates.values()}
    assert reasons == {"duplicate", "near_duplicate", "face_duplicate"}


@pytest.mark.parametrize("exact_rows", [30_000, 300], ids=["exact", "index"])
def test_later_samples_do_not_change_earlier_results(exact_rows: int) -> None:
    rng = np.random.default_rng(3)
    pairs = unit(np.repeat(crowd(700, 1, 0, dim=128)[0], 2, 0))
    vectors = unit(pairs + 0.15 * rng.standard_normal(pairs.shape) / np.sqrt(128))
    vectors = vectors[rng.permutation(1400)]
    digests, hashes = [""] * 1400, np.zeros((1400, 32), np.uint8)
    whole = find_duplicates(digests, hashes, vectors, 10, 0.95, exact_rows, block_rows=64)
    assert len(whole) > 650, "nearly all of the 700 that resemble an earlier one"
    for count in (1, 63, 64, 500, 801, 1399):
        part = find_duplicates(
            digests[:count], hashes[:count], vectors[:count], 10, 0.95, exact_rows, block_rows=64
        )
        assert part == {row: duplicate for row, duplicate in whole.items() if row < count}


def test_a_duplicate_of_a_dropped_sample_is_compared_with_the_kept_ones() -> None:
    hashes = np.zeros((4, 32), np.uint8)
    # each differs from the one before in 2, 2 and 1 bits
    hashes[:, 0] = [0b10000000, 0b10000011, 0b10001111, 0b10001110]
    duplicates = find_duplicates([""] * 4, hashes, np.zeros((4, 8), np.float32), 2, 0.95)
    assert duplicates == {
        1: Duplicate("near_duplicate", 0, 2.0),
        3: Duplicate("near_duplicate", 2, 1.0),
    }


def test_one_of_thousands_of_nearly_equal_samples_is_kept() -> None:
    rng = np.random.default_rng(0)
    hashes = np.full((6000, 32), 85, np.uint8)
    hashes[np.arange(1, 6000), rng.integers(0, 32, 5999)] ^= 1
    vectors = np.tile(np.eye(1, 64, dtype=np.float32), (6000, 1))
    by_hash = find_duplicates([""] * 6000, hashes, vectors, 10, 0.95)
    assert sorted(by_hash) == list(range(1, 6000))
    assert {duplicate.of for duplicate in by_hash.values()} == {0}
    by_face = find_duplicates([""] * 6000, hashes, vectors, -1, 0.95)
    assert {duplicate.reason for duplicate in by_face.values()} == {"face_duplicate"}
