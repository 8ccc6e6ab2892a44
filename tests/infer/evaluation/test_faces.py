"""What is measured of pictures and of samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from infer.evaluation.faces import FaceMeasurer, MeasuredPicture, enlarged
from infer.evaluation.people import Person
from stages.annotations import Measures
from stages.codec import decode_labels


def test_a_sample_is_measured_as_the_pipeline_did(
    people: list[Person], references: dict[str, MeasuredPicture]
) -> None:
    for person in people:
        record, face = person.reference, references[person.name].face
        measures = record.annotation(Measures)
        assert face is not None and record.identity is not None and measures is not None
        np.testing.assert_allclose(face.embeddings["arcface"], record.identity, atol=1e-6)
        assert face.face == record.main_face
        assert np.array_equal(face.labels, decode_labels(record.parsing))
        assert face.yaw == pytest.approx(measures.yaw, abs=0.01)
        assert face.pitch == pytest.approx(measures.pitch, abs=0.01)


def test_small_photographs_show_the_same_people(
    references: dict[str, MeasuredPicture], small_photos: dict[str, MeasuredPicture]
) -> None:
    for name, small in small_photos.items():
        face, reference = small.face, references[name].face
        assert face is not None and reference is not None and face.has_parts
        assert small.picture.shape == (256, 256, 3) and face.labels.shape == (256, 256)
        shapes = {name: embedding.shape for name, embedding in face.embeddings.items()}
        assert shapes == {"arcface": (512,), "sface": (128,)}
        for recogniser, embedding in face.embeddings.items():
            assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-5)
            assert embedding @ reference.embeddings[recogniser] > 0.5
        assert abs(face.yaw - reference.yaw) < 8


def test_a_covered_mouth_is_no_part_and_a_grey_picture_has_no_face(
    measurer: FaceMeasurer, small_photos: dict[str, MeasuredPicture]
) -> None:
    photo = next(iter(small_photos.values()))
    assert photo.face is not None
    covered = photo.picture.copy()
    _, _, nose, left, right = photo.face.face.landmarks
    top, bottom = round((nose[1] + left[1]) / 2), round(left[1] + (left[1] - nose[1]))
    covered[top:bottom, round(left[0]) - 30 : round(right[0]) + 30] = 255
    grey = np.full((64, 64, 3), 128, np.uint8)
    both = np.concatenate((photo.picture, photo.picture), axis=1)
    first, second, third, twice = measurer.pictures([grey, covered, photo.picture, both])
    assert first.face is None and first.picture.shape == (256, 256, 3)
    assert [each.faces for each in (first, second, third, twice)] == [0, 1, 1, 2]
    assert second.face is not None and not second.face.has_parts
    assert third.face is not None and third.face.has_parts  # rows aren't mixed up
    np.testing.assert_allclose(
        third.face.embeddings["sface"], photo.face.embeddings["sface"], atol=1e-4
    )


def test_parts_are_eyes_or_glasses_with_nose_and_mouth(
    small_photos: dict[str, MeasuredPicture],
) -> None:
    face = next(iter(small_photos.values())).face
    assert face is not None
    seen = []
    for regions, glasses in (
        ({"eyes", "nose", "mouth"}, False),
        ({"nose", "mouth"}, True),
        ({"nose", "mouth"}, False),
        ({"eyes", "mouth"}, True),
        ({"eyes", "nose"}, True),
    ):
        looks = replace(face.appearance, regions=frozenset(regions), glasses=glasses)
        seen.append(replace(face, appearance=looks).has_parts)
    assert seen == [True, True, False, False, False]


def test_only_small_pictures_are_enlarged() -> None:
    assert enlarged(np.zeros((64, 96, 3), np.uint8)).shape == (256, 384, 3)
    assert enlarged(np.zeros((300, 256, 3), np.uint8)).shape == (300, 256, 3)
