"""Captions of the `attributes` backend, for drawn faces and for real portraits."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.attributes import COLORS, LIGHTS, in_other_light
from configs.captions import AttributesConfig
from stages.backends.attributes import Attributes, appearance_of
from stages.codec import decode_jpeg, decode_labels, encode_jpeg, encode_labels
from stages.record import Record, key_of
from stages.regions import LABEL_IDS, REGION_LABELS, REGION_WORDS
from tests.stages.drawing import ALL_PARTS, WHITE, draw
from tests.stages.records import texts_of


def clauses(text: str) -> list[str]:
    return re.split(r"[,.;]", text)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


@settings(max_examples=40, deadline=None)
@given(
    parts=st.sets(st.sampled_from(sorted(ALL_PARTS)), min_size=1), key=st.integers(0, 16**20 - 1)
)
def test_each_visible_region_is_named_once_in_a_separate_clause(parts: set[str], key: int) -> None:
    drawing = draw(frozenset(parts))
    _, fine = drawing.captions(f"{key:020x}")
    labels_of = {
        word: ("skin",) if word == "face" else REGION_LABELS[word] for word in REGION_WORDS
    }
    visible = {
        word
        for word, labels in labels_of.items()
        if any((drawing.labels == LABEL_IDS[n]).any() for n in labels)
    }
    counts = {word: words(fine).count(word) for word in REGION_WORDS}
    assert counts == {word: int(word in visible) for word in REGION_WORDS}, fine
    for clause in clauses(fine):
        assert sum(word in words(clause) for word in REGION_WORDS) <= 1, fine
    assert len(clauses(fine.rstrip("."))) == max(len(visible), 1), "one clause for each region"


def test_one_visible_ear_is_still_named_by_the_plural() -> None:
    _, fine = draw(ALL_PARTS - {"left_ear"}).captions()
    assert re.search(r"one of the ears (is visible|shows)", fine)


def test_captions_are_short_and_guess_no_sex_or_age(full_records: list[Record]) -> None:
    guesses = {"man", "woman", "boy", "girl", "he", "she", "his", "her", "young", "old"}
    guesses |= {"male", "female", "child"}
    for coarse, fine in texts_of(Attributes(AttributesConfig()).caption(full_records)):
        assert len(fine) <= 330
        assert len(re.findall(r"\w+|[^\w\s]", fine)) <= 50, "each word is one CLIP token"
        assert len(re.findall(r"\w+|[^\w\s]", coarse)) <= 60
        assert not guesses & set(words((coarse + fine).lower()))
        assert re.fullmatch(r"A (close-up )?portrait [^.]+\.( [A-Z][^.]+\.)?", coarse), coarse
        assert re.fullmatch(r"[A-Z][^.]+\.", fine), fine


@pytest.fixture(scope="module")
def full_records() -> list[Record]:
    """Drawings of every pose, with hat, necklace and earrings, each under another key."""
    records = []
    for number in range(27):
        drawing = draw()
        drawing.box("hat", (140, 372), (60, 150), (150, 30, 30))
        drawing.box("necklace", (200, 312), (440, 455), WHITE)
        drawing.image[440:455, 200:312:2] = 20
        for x in (130, 370):
            drawing.box("earring", (x, x + 14), (280, 300), WHITE)
            drawing.image[280:300, x : x + 14 : 2] = 20
        shift = (number % 9 - 4) * 22
        drawing.landmarks = (*drawing.landmarks[:2], (256 + shift, 290), *drawing.landmarks[3:])
        records.append(
            Record(
                key=key_of(str(number)),
                source=str(number),
                image=encode_jpeg(drawing.image, 95),
                parsing=encode_labels(drawing.labels),
                faces=(drawing.face,),
                face=0,
            )
        )
    return records


def test_phrases_depend_on_the_key_only(full_records: list[Record]) -> None:
    backend = Attributes(AttributesConfig())
    one_by_one = [backend.caption([record])[0] for record in full_records]
    assert backend.caption(full_records) == one_by_one
    drawing = draw()
    assert len({drawing.captions(key_of(str(n)))[1] for n in range(12)}) > 4


@pytest.fixture(scope="module")
def parsed(portraits: Path) -> list[Record]:
    """The eight portraits after resize, detect, parse and caption."""
    from configs.schema import DatasetConfig
    from stages.base import run_stage
    from stages.chain import build_stages

    records = [
        Record(key=key_of(path.name), source=path.name, image=path.read_bytes())
        for path in sorted(portraits.iterdir())
    ]
    for stage in build_stages(DatasetConfig()):
        if stage.name != "embed":  # captions don't need it
            stage.setup()
            records = run_stage(stage, records)
    return records


@pytest.mark.slow
def test_captions_of_real_portraits_name_parsed_regions_only(parsed: list[Record]) -> None:
    assert len(parsed) == 8
    for record in parsed:
        assert record.ok, (record.reason, record.detail)
        labels = decode_labels(record.parsing)
        named = {word for word in REGION_WORDS if word in words(record.face_caption)}
        assert {"face", "nose", "mouth"} <= named, "all of these portraits show them"
        for word in named:
            assert np.isin(labels, [LABEL_IDS[name] for name in REGION_LABELS[word]]).any()
        assert decode_jpeg(record.image).shape[:2] == labels.shape


@pytest.mark.slow
def test_named_colours_of_real_portraits_stay_in_the_dark(parsed: list[Record]) -> None:
    before = [appearance_of(record) for record in parsed]
    assert sum(bool(appearance.hair_color) for appearance in before) >= 5
    for light in ("1 stop darker", "2 stops darker"):
        after = [appearance_of(in_other_light(record, LIGHTS[light])) for record in parsed]
        for attribute in COLORS.values():
            names = [
                (getattr(one, attribute), getattr(other, attribute))
                for one, other in zip(before, after, strict=True)
            ]
            assert sum(bool(one) and one != other for one, other in names) <= 1, (light, names)
