"""Copies, identities and split: against brute force, and where they would break on many equal or
chained pictures.
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
    similarities,
    split_of,
    within,
)
from pipelines.dedup.hashes import Hashes
from pipelines.dedup.nearest import Floats

NONE = np.zeros((0, 32), np.uint8)


@pytest.fixture
def threads() -> Iterator[None]:
    """Tests may change faiss's threads."""
    before = faiss.omp_get_max_threads()
    yield
    faiss.omp_set_num_threads(before)


def unit(vectors: Floats) -> Floats:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def crowd(
    people: int, each: int, noise: float, seed: int = 0, dim: int = 64
) -> tuple[Floats, np.ndarray]:
    """(vectors, person), mixed; cosines of one person are about 1 / (1 + noise²)."""
    rng = np.random.default_rng(seed)
    person = rng.permutation(np.repeat(np.arange(people), each))
    centres = unit(rng.standard_normal((people, dim)))
    return unit(
        centres[person] + noise * rng.standard_normal((len(person), dim)) / np.sqrt(dim)
    ), person


def near_hashes(count: int, seed: int = 0) -> Hashes:
    """Some hashes, and others a few bits from an earlier one; some are equal."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 256, (count, 32), np.uint8)
    for row in range(1, count, 2):
        flips = rng.permutation(np.arange(256) < rng.integers(0, 9))
        hashes[row] = hashes[rng.integers(0, row)] ^ np.packbits(flips)
    return hashes


def bits(left: Hashes, right: Hashes) -> np.ndarray:
    return np.bitwise_count(left[:, None] ^ right[None]).sum(-1, dtype=np.int64)


# --------------------------------------------------------------------------------------------------


def test_pairs_of_hashes_are_all_there_are() -> None:
    hashes = near_hashes(900)
    distance = bits(hashes, hashes)
    first = (distance == 0).argmax(1)
    own = np.flatnonzero(first == np.arange(len(hashes)))
    assert len(own) < len(hashes), "some are equal"
    for most in (0, 1, 4, 10):
        found = near_by_hash(hashes, most, block_rows=256)
        left, right = np.nonzero(np.triu(distance[np.ix_(own, own)] <= most, 1))
        assert (len(left) > 0) == (most > 0), "pairs of different hashes, or none at 0 bits"
        assert (found.first == first).all()
        assert (
            found.left.tolist() == own[left].tolist()
            and found.right.tolist() == own[right].tolist()
        )
        assert (found.distance == distance[found.left, found.right]).all()


def test_ten_thousand_equal_hashes_are_one_group() -> None:
    hashes = np.full((10_001, 32), 7, np.uint8)
    hashes[4000, 0] ^= 1
    found = near_by_hash(hashes, 10)
    assert [column.tolist() for column in found[1:]] == [[0], [4000], [1]]
    assert np.flatnonzero(found.first).tolist() == [4000]


def test_hashes_near_a_query_come_closest_first() -> None:
    hashes = near_hashes(300)
    found = within(hashes[5:8], hashes, 12)
    distance = bits(hashes[5:8], hashes)
    wanted = [(q, d, r) for q in range(3) for r, d in enumerate(distance[q].tolist()) if d <= 12]
    assert list(zip(found.query, found.distance, found.row, strict=True)) == sorted(wanted)
    assert len(wanted) > 3


def test_no_hashes_have_no_pairs() -> None:
    assert all(not len(column) for column in near_by_hash(NONE, 10))
    assert all(not len(column) for column in within(NONE, near_hashes(3), 10))


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("least", "k"), [(0.5, 5), (0.2, 40), (0.999, 3)])
def test_few_vectors_have_exactly_their_nearest(least: float, k: int) -> None:
    vectors, _ = crowd(60, 25, 0.9)
    found = near_by_identity(vectors, least, k)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1)
    wanted = -np.sort(-cosines, axis=1)[:, :k]
    wanted = np.where(wanted >= least, wanted, 0)
    assert np.abs(found.similarity - wanted).max() < 1e-5
    query, place = np.nonzero(found.row >= 0)
    assert ((found.row >= 0) == (wanted > 0)).all()
    row = found.row[query, place]
    assert (query != row).all()
    assert (found.similarity[query, place] == similarities(vectors, query, row)).all()


def test_cells_find_nearly_all_with_exact_figures(tmp_path: Path) -> None:
    vectors, _ = crowd(1500, 4, 0.8)
    stored = np.memmap(tmp_path / "vectors", np.float16, "w+", shape=vectors.shape)
    stored[:] = vectors
    exact = near_by_identity(stored, 0.5, 3)
    cells = near_by_identity(stored, 0.5, 3, exact_rows=1000, probes=14)
    good = exact.row >= 0
    hit = np.array([np.isin(a, b) for a, b in zip(exact.row, cells.row, strict=True)])
    assert good.sum() > 10_000
    assert 0.95 < hit[good].mean() < 1, (
        "24 cells of which 14 are searched: nearly all, or it wasn't cells"
    )
    query, place = np.nonzero(cells.row >= 0)
    figures = similarities(stored, query, cells.row[query, place])
    assert (cells.similarity[query, place] == figures).all()


@pytest.mark.parametrize("exact_rows", [30_000, 500], ids=["exact", "cells"])
def test_neighbours_do_not_depend_on_threads(exact_rows: int, threads: None) -> None:
    vectors, _ = crowd(500, 3, 0.8, dim=200)
    answers = []
    for count in (1, 2, 2):
        faiss.omp_set_num_threads(count)
        answers.append(near_by_identity(vectors, 0.3, 8, exact_rows=exact_rows))
    for answer in answers[1:]:
        assert (answer.row == answers[0].row).all() and (
            answer.similarity == answers[0].similarity
        ).all()


def test_a_vector_of_zeros_is_near_nothing() -> None:
    vectors, _ = crowd(3, 3, 0.1)
    vectors[[2, 5]] = 0
    found = near_by_identity(vectors, 0.01, 8)
    assert (found.row[[2, 5]] == -1).all() and not np.isin(found.row, [2, 5]).any()


def test_a_similarity_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected over 0"):
        near_by_identity(np.eye(3, dtype=np.float32), 0, 1)


# --------------------------------------------------------------------------------------------------


def clustered(vectors: Floats, least: float, k: int) -> np.ndarray:
    return cluster(vectors, near_by_identity(vectors, least, k), least)


@pytest.mark.parametrize("least", [0.3, 0.45, 0.6])
@pytest.mark.parametrize("noise", [0.6, 1.2])
def test_clusters_are_those_of_average_linkage(least: float, noise: float) -> None:
    vectors, _ = crowd(40, 8, noise, dim=24)  # few dimensions: strangers come close
    labels = clustered(vectors, least, len(vectors) - 1)
    distance = 1 - vectors.astype(np.float64) @ vectors.T
    np.fill_diagonal(distance, 0)
    wanted = fcluster(linkage(squareform(distance, checks=False), "average"), 1 - least, "distance")
    first = {label: row for row, label in reversed(list(enumerate(wanted.tolist())))}
    assert labels.tolist() == [first[label] for label in wanted.tolist()], (
        "and each is known by its earliest member"
    )
    assert 1 < len(first) < len(vectors)


@pytest.mark.parametrize("degrees", [50.0, 9.0])  # cosines of 0.64, and of 0.988, as of copies
def test_a_chain_is_not_one_identity(degrees: float) -> None:
    vectors = np.zeros((24, 48), np.float32)
    for row in range(24):  # each turns into a direction of its own
        vectors[row] = vectors[row - 1] * np.cos(np.radians(degrees)) if row else 0
        vectors[row, row] = np.sin(np.radians(degrees)) if row else 1
    assert np.allclose(
        similarities(vectors, np.arange(23), np.arange(1, 24)),
        np.cos(np.radians(degrees)),
        atol=1e-5,
    )
    least = np.cos(np.radians(degrees)) - 0.04
    labels = clustered(vectors, least, 23)
    assert len(np.unique(labels)) > 4 and labels[0] != labels[-1]
    assert (labels[labels] == labels).all(), "each is known by a member"
    for label in np.unique(labels):
        own = vectors[labels == label]
        pairs = (own @ own.T)[np.triu_indices(len(own), 1)]
        assert not len(pairs) or pairs.mean() >= least - 1e-4


def test_two_sessions_of_one_person_meet_though_all_nearest_are_of_their_own() -> None:
    rng = np.random.default_rng(0)
    sessions = unit(np.array([[1, 0.6], [1, -0.6]]) @ np.eye(2, 64))
    vectors = unit(np.repeat(sessions, 60, 0) + 0.03 * rng.standard_normal((120, 64)))
    near = near_by_identity(vectors, 0.4, 8)
    assert ((near.row < 60) == (np.arange(120) < 60)[:, None]).all(), "or this tests nothing"
    assert not cluster(vectors, near, 0.4).any()


def test_thousands_of_equal_vectors_are_one_identity() -> None:
    vectors = np.concatenate(
        [np.tile(np.eye(1, 64, dtype=np.float32), (4000, 1)), np.eye(2, 64, 5, np.float32)]
    )
    labels = clustered(vectors, 0.5, 16)
    assert not labels[:4000].any() and labels[4000:].tolist() == [4000, 4001]


def test_people_are_told_apart_by_their_cells_too() -> None:
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


# --------------------------------------------------------------------------------------------------


def test_the_split_is_of_the_id_alone() -> None:
    ids = [f"id-{number:012x}" for number in range(20_000)]
    sides = [split_of(one, 0.02, 0) for one in ids]
    assert 300 < sides.count("val") < 500
    assert [i for i, side in enumerate(sides) if side == "val"][:4] == PINNED, (
        "a kept data set's split would change"
    )
    assert sides != [split_of(one, 0.02, 1) for one in ids]
    larger = [split_of(one, 0.05, 0) for one in ids]
    assert all(
        large == "val" for side, large in zip(sides, larger, strict=True) if side == "val"
    ), "val only grows"
    assert {split_of(one, 0, 0) for one in ids} == {"train"} and {
        split_of(one, 1, 0) for one in ids
    } == {"val"}


PINNED = [82, 120, 160, 178]


# --------------------------------------------------------------------------------------------------


def by_hand(
    shas: list[str], hashes: Hashes, vectors: Floats, most: int, least: float
) -> dict[int, Duplicate]:
    """Greedy, as the docstring of `find_duplicates` says it, one by one."""
    kept: list[int] = []
    found = {}
    for row, sha in enumerate(shas):
        equal = [other for other in kept if sha and shas[other] == sha]
        far = [
            (int(bits(hashes[[row]], hashes[[other]])[0, 0]), other)
            for other in kept
            if hashes[other].any()
        ]
        cosines = [
            (float(similarities(vectors, np.array([row]), np.array([other]))[0]), -other)
            for other in kept
        ]
        if equal:
            found[row] = Duplicate("duplicate", equal[0], 0.0)
        elif hashes[row].any() and far and min(far)[0] <= most:
            found[row] = Duplicate("near_duplicate", min(far)[1], float(min(far)[0]))
        elif least and cosines and max(cosines)[0] >= least:
            found[row] = Duplicate("face_duplicate", -max(cosines)[1], max(cosines)[0])
        else:
            kept.append(row)
    return found


def pictures(count: int, seed: int) -> tuple[list[str], Hashes, Floats]:
    """Few files, hashes and faces, so that every reason and many ties occur; some have no hash, no
    face, no sha256.
    """
    rng = np.random.default_rng(seed)
    hashes = np.concatenate([np.zeros((1, 32), np.uint8), near_hashes(max(2, count // 3), seed)])
    faces = unit(np.repeat(rng.standard_normal((max(2, count // 5), 16)), 2, 0))
    faces = np.concatenate(
        [np.zeros((1, 16), np.float32), unit(faces + 0.08 * rng.standard_normal(faces.shape))]
    )
    shas = np.array(["", *(f"{number:064x}" for number in range(count * 2))])
    picked = rng.integers(0, len(hashes), count), rng.integers(0, len(faces), count)
    return shas[rng.integers(0, len(shas), count)].tolist(), hashes[picked[0]], faces[picked[1]]


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 60),
    seed=st.integers(0, 10_000),
    most=st.integers(-1, 12),
    least=st.sampled_from([0, 0.9]),
)
def test_twins_are_those_found_one_by_one(count: int, seed: int, most: int, least: float) -> None:
    shas, hashes, vectors = pictures(count, seed)
    wanted = by_hand(shas, hashes, vectors, most, least)
    for block in (7, 1024):
        assert find_duplicates(shas, hashes, vectors, most, least, block_rows=block) == wanted


def test_every_reason_occurs() -> None:
    found = find_duplicates(*pictures(60, 1), 6, 0.9)
    assert {twin.reason for twin in found.values()} == {
        "duplicate",
        "near_duplicate",
        "face_duplicate",
    }


@pytest.mark.parametrize("exact_rows", [30_000, 300], ids=["exact", "cells"])
def test_pictures_behind_change_no_verdict(exact_rows: int) -> None:
    vectors = unit(np.repeat(crowd(700, 1, 0, dim=128)[0], 2, 0))
    rng = np.random.default_rng(3)
    vectors = unit(vectors + 0.15 * rng.standard_normal(vectors.shape) / np.sqrt(128))[
        rng.permutation(1400)
    ]
    shas, hashes = [""] * 1400, np.zeros((1400, 32), np.uint8)
    whole = find_duplicates(shas, hashes, vectors, 10, 0.95, exact_rows, block_rows=64)
    assert len(whole) > 650, "nearly all of the 700 that have an earlier twin"
    for count in (1, 63, 64, 500, 801, 1399):
        part = find_duplicates(
            shas[:count], hashes[:count], vectors[:count], 10, 0.95, exact_rows, block_rows=64
        )
        assert part == {row: twin for row, twin in whole.items() if row < count}


def test_a_copy_of_a_dropped_picture_is_measured_against_those_kept() -> None:
    hashes = np.zeros((4, 32), np.uint8)
    # 2 bits from one to the next, then 1
    hashes[:, 0] = [0b10000000, 0b10000011, 0b10001111, 0b10001110]
    found = find_duplicates([""] * 4, hashes, np.zeros((4, 8), np.float32), 2, 0.95)
    assert found == {1: Duplicate("near_duplicate", 0, 2.0), 3: Duplicate("near_duplicate", 2, 1.0)}


def test_thousands_of_near_equal_pictures_leave_one() -> None:
    rng = np.random.default_rng(0)
    hashes = np.full((6000, 32), 85, np.uint8)
    hashes[np.arange(1, 6000), rng.integers(0, 32, 5999)] ^= 1
    vectors = np.tile(np.eye(1, 64, dtype=np.float32), (6000, 1))
    found = find_duplicates([""] * 6000, hashes, vectors, 10, 0.95)
    assert sorted(found) == list(range(1, 6000)) and {twin.of for twin in found.values()} == {0}
    assert {
        twin.reason for twin in find_duplicates([""] * 6000, hashes, vectors, -1, 0.95).values()
    } == {"face_duplicate"}
