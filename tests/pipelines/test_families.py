"""Families of synthetic portraits. As in conftest.py, a process of its own makes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.demo.directions import (
    DETECT,
    EMBED,
    MEASURES,
    _solve,
    largest_face,
    load_directions,
)
from pipelines.demo.families import ARCFACE, SFACE
from stages.backends.arcface import ArcFace, crop
from stages.backends.scrfd import Scrfd
from stages.backends.sface import SAME_PERSON, SFace
from stages.backends.weights import Weights
from stages.codec import decode_jpeg
from stages.record import FloatArray
from tests.sharing import shared_folder

COMMAND = [sys.executable, "-m", "pipelines.cli", "synthesize", "--pictures", "2", "--side", "128"]


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two people, two pictures each."""

    def make(folder: Path) -> None:
        command = [*COMMAND, "--people", "2", "--seed", "3", str(folder)]
        subprocess.run(command, check=True, capture_output=True)

    return shared_folder(tmp_path_factory, "people", make)


@pytest.fixture(scope="module")
def embeddings(people: Path) -> dict[str, tuple[FloatArray, FloatArray]]:
    """ "PERSON/NUMBER" → embeddings of unit norm by ArcFace and SFace."""
    weights = Weights()
    detector, arcface, sface = Scrfd(DETECT, weights), ArcFace(EMBED, weights), SFace(weights)
    result = {}
    for path in sorted(people.glob("*/*.jpg")):
        image = decode_jpeg(path.read_bytes())
        face = largest_face(detector, image)
        assert face is not None
        aligned = [crop(image, face)]
        first = arcface.embed_crops(aligned)[0]
        result[f"{path.parent.name}/{path.stem}"] = (
            first / np.linalg.norm(first),
            sface.embed_crops(aligned)[0],
        )
    return result


@pytest.mark.thorough
def test_two_recognisers_agree_on_who_is_who(
    embeddings: dict[str, tuple[FloatArray, FloatArray]],
) -> None:
    for person in ("3-00000", "3-00001"):
        first, second = embeddings[f"{person}/0"], embeddings[f"{person}/1"]
        # the files are JPEGs of what was compared
        assert ARCFACE - 0.03 < first[0] @ second[0] < 0.99
        assert SFACE - 0.03 < first[1] @ second[1] < 0.99
    one, other = embeddings["3-00000/0"], embeddings["3-00001/0"]
    assert one[0] @ other[0] < ARCFACE
    assert one[1] @ other[1] < SAME_PERSON < SFACE


@pytest.mark.thorough
def test_a_person_depends_on_seed_and_number_only(people: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "3-00000", tmp_path / ".3-00001.partial"
    whole.mkdir()  # as if it had been made
    part.mkdir()
    (part / "0.jpg").write_bytes(b"cut off")
    command = [*COMMAND, "--people", "2", "--seed", "3", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3-00000", "3-00001"]
    assert not [*whole.iterdir()]
    for name in ("0.jpg", "1.jpg"):
        assert (tmp_path / "3-00001" / name).read_bytes() == (
            people / "3-00001" / name
        ).read_bytes()


def test_directions_change_one_measure_and_nothing_else() -> None:
    """On styles whose measures and embeddings are linear, plus noise."""
    random = np.random.default_rng(0)
    spread = np.geomspace(3, 0.05, 512)
    styles = random.standard_normal((2000, 512)) * spread
    slopes = random.standard_normal((512, len(MEASURES)))
    measures = styles @ slopes + 0.1 * random.standard_normal((2000, len(MEASURES)))
    basis = random.standard_normal((512, 512)) * (np.arange(512) < 20)  # 20 dimensions vary
    identities = styles @ basis / 100 + 0.001 * random.standard_normal((2000, 512)) + 1
    steps = _solve(styles, measures, identities)
    units = measures.std(0)
    for place, name in enumerate(MEASURES):
        change = steps[name] @ slopes / units
        assert change[place] == pytest.approx(1, abs=0.1)
        assert np.abs(np.delete(change, place)).max() < 0.1
        plain = spread**2 * slopes[:, place]
        plain *= units[place] / (plain @ slopes[:, place])
        assert np.linalg.norm(steps[name] @ basis) < 0.5 * np.linalg.norm(plain @ basis)


def test_the_directions_file_has_a_step_for_each_measure() -> None:
    directions = load_directions()
    assert set(directions) == set(MEASURES)
    for name, step in directions.items():
        assert step.shape == (512,) and step.dtype == np.float32, name
        assert 0.5 < np.linalg.norm(step) < 5, name
