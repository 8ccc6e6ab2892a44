"""Resemblance: photographs in place of portraits, the right ones and those of other people."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from configs.errors import ConfigError
from infer.evaluation.faces import RECOGNISERS, MeasuredPicture
from infer.evaluation.people import of_another
from infer.evaluation.resemblance import likeness, measure_portraits

Pictures = dict[str, MeasuredPicture]


def test_the_photographs_themselves_resemble_their_people(
    references: Pictures, small_photos: Pictures
) -> None:
    equal = measure_portraits({n: [p] for n, p in references.items()}, references, seed=1)
    small = measure_portraits({n: [p, p] for n, p in small_photos.items()}, references, seed=1)
    assert small.portraits == 8 and small.has_face.mean == small.has_parts.mean == 1
    for recogniser in RECOGNISERS:
        exact, reduced = (each.resemblance[recogniser] for each in (equal, small))
        assert all(person.right == pytest.approx(1, abs=1e-5) for person in exact.people)
        assert exact.first.mean == reduced.first.mean == 1 and exact.chance == 0.25
        assert 0 < reduced.advantage.low < reduced.advantage.mean < exact.advantage.mean
        for person in exact.people:
            assert person.right is not None and person.others is not None
            assert person.advantage == pytest.approx(person.right - person.others)
    json.dumps(asdict(small))


def test_the_portraits_of_other_people_do_not(references: Pictures, small_photos: Pictures) -> None:
    others = of_another([*small_photos])
    wrong = {name: [small_photos[others[name]]] for name in small_photos}
    measured = measure_portraits(wrong, references, seed=1)
    for resemblance in measured.resemblance.values():
        assert resemblance.first.mean == 0 and resemblance.advantage.high < 0
    name = next(iter(references))
    first = likeness(small_photos[others[name]], name, references)
    assert first is not None and first.nearest_person == others[name] and not first.is_first
    assert first.nearest > first.others > first.right - 1 and first.nearest > first.right
    right = likeness(small_photos[name], name, references, "sface")
    assert right is not None and right.is_first and right.right > right.nearest >= right.others


def test_a_portrait_without_a_face_resembles_nobody(
    references: Pictures, small_photos: Pictures
) -> None:
    portraits = {n: [p, replace(p, face=None, faces=0)] for n, p in small_photos.items()}
    whole = measure_portraits({n: [p] for n, p in small_photos.items()}, references, seed=1)
    half = measure_portraits(portraits, references, seed=1)
    assert half.has_face.mean == half.one_face.mean == half.has_parts.mean == 0.5
    crowd = {n: [replace(p, faces=2)] for n, p in small_photos.items()}
    crowded = measure_portraits(crowd, references, seed=1)
    assert (crowded.has_face.mean, crowded.one_face.mean) == (1, 0)
    both = zip(whole.resemblance.values(), half.resemblance.values(), strict=True)
    for one, other in both:
        assert other.first.mean == 0.5
        assert other.advantage.mean == pytest.approx(one.advantage.mean / 2)
        assert [p.right for p in other.people] == [p.right for p in one.people]
    assert likeness(portraits[next(iter(portraits))][1], next(iter(portraits)), references) is None
    nobody = {n: [replace(p, face=None)] for n, p in small_photos.items()}
    assert (
        measure_portraits(nobody, references, seed=1).resemblance["sface"].people[0].right is None
    )


def test_people_without_what_is_compared_are_errors(references: Pictures) -> None:
    name = next(iter(references))
    portrait = references[name]
    with pytest.raises(ConfigError, match="references are of 1 people"):
        likeness(portrait, name, {name: portrait})
    with pytest.raises(ConfigError, match="no reference of nobody"):
        likeness(portrait, "nobody", references)
    with pytest.raises(ConfigError, match=f"no face in the reference of {name}"):
        likeness(portrait, name, references | {name: replace(portrait, face=None)})
    with pytest.raises(ConfigError, match="no portraits"):
        measure_portraits({name: []}, references, seed=1)
