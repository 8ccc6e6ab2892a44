"""bench.people: rates of known vectors, and a run on real faces."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from bench.person_rates import rates, table
from stages.backends.same_person import upper_bound


def _vectors(*degrees: float) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Unit vectors in the plane: the cosine of two is that of the angle between them."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def test_recall_and_false_matches_of_known_vectors() -> None:
    vectors = _vectors(0, 10, 60, 90, 180)
    people = ["ann", "ann", "ann", "ben", "carl"]
    [low, high] = rates(vectors, people, 1, (0.49, 0.9))
    # 0 and 10 degrees find each other and 60 finds both at 0.49; at 0.9 it finds nobody
    assert (low.queries, low.recall, low.complete) == (3, 1, 1)
    assert (high.queries, high.recall, high.complete) == (3, pytest.approx(1 / 3), 0)
    # pairs: ann's three with ben (90, 80, 30 degrees) and with carl, and ben with carl
    assert (low.false, low.pairs) == (1, 7) and (high.false, high.pairs) == (0, 7)
    assert low.bound == upper_bound(1, 7) and high.bound == pytest.approx(1 - 0.05 ** (1 / 7))


def test_several_photographs_together_find_what_each_of_them_finds() -> None:
    vectors, people = _vectors(0, 40, 80), ["ann"] * 3
    limit = (math.cos(math.radians(45)),)
    [one], [two], [three] = (rates(vectors, people, photos, limit) for photos in (1, 2, 3))
    assert (one.queries, one.recall) == (3, pytest.approx(2 / 3))
    assert (two.queries, two.recall, two.complete) == (3, 1, 1)
    assert three.queries == 0 and math.isnan(three.recall)


def test_people_with_one_photograph_are_no_queries() -> None:
    [line] = rates(_vectors(0, 1, 2), ["ann", "ben", "carl"], 1, (0.5,))
    assert (line.queries, line.false, line.pairs, line.bound) == (0, 3, 3, 1)
    assert "3 of 3" in list(table([line]))[1]


def test_the_command_prints_rates_of_a_folder_of_people(portraits: Path, tmp_path: Path) -> None:
    for path in sorted(portraits.glob("*.jpg"))[:3]:
        folder = tmp_path / path.stem
        folder.mkdir()
        image = cv2.resize(cv2.imread(str(path)), (400, 400), interpolation=cv2.INTER_AREA)
        edits = {"plain": image, "dark": image // 2, "near": image[30:370, 30:370]}
        for name, edited in edits.items():
            cv2.imwrite(str(folder / f"{name}.jpg"), edited)
    cv2.imwrite(str(folder / "grey.jpg"), np.full((256, 256, 3), 128, np.uint8))
    result = _run(str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "9 of 10 photographs, 3 people, w600k_mbf" in result.stdout
    assert "grey.jpg: no face" in result.stdout
    assert "9 queries of 1 photograph\n" in result.stdout
    assert "9 queries of 2 photographs" in result.stdout and "of 3 photographs" not in result.stdout
    [line] = [each for each in result.stdout.splitlines() if each.startswith("  0.40")][:1]
    assert line.split()[:3] == ["0.40", "100.0%", "100.0%"] and "of 27" in line


def test_a_folder_without_photographs_is_an_error(tmp_path: Path) -> None:
    result = _run(str(tmp_path))
    assert result.returncode == 2 and "FOLDER/PERSON/*.jpg" in result.stderr
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann/empty.jpg").touch()
    result = _run(str(tmp_path), "--weights", "det_10g")
    assert result.returncode == 2 and "embed.weights='det_10g'" in result.stderr
    result = _run(str(tmp_path))
    assert result.returncode == 2 and "empty.jpg: empty file" in result.stdout


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.people", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)
