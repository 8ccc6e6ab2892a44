"""The `attributes` captions: every word must follow from what a drawn label map and its picture
show.
"""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.captions import AttributesConfig
from stages.backends.attributes import Attributes, describe, describe_face
from stages.backends.colors import fabric_color, hair_color, to_lab
from stages.backends.measures import MIN_SHARE, Measured, measure
from stages.codec import decode_jpeg, decode_labels, encode_jpeg, encode_labels
from stages.record import Face, Record, key_of
from stages.regions import LABEL_IDS, REGION_LABELS, REGION_WORDS
from tests.stages.drawing import ALL_PARTS, BLACK, BROWN, LIPS, SIDE, SKIN, WHITE, Drawing, draw


def clauses(text: str) -> list[str]:
    return re.split(r"[,.;]", text)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


# ---------------------------------------------------------------------------- the words the facial


@settings(max_examples=40, deadline=None)
@given(
    parts=st.sets(st.sampled_from(sorted(ALL_PARTS)), min_size=1), key=st.integers(0, 16**20 - 1)
)
def test_every_visible_region_is_named_once_in_a_clause_of_its_own_and_no_other(
    parts: set[str], key: int
) -> None:
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
    count = {word: words(fine).count(word) for word in REGION_WORDS}
    assert count == {word: int(word in visible) for word in REGION_WORDS}, fine
    assert all(
        sum(word in words(clause) for word in REGION_WORDS) <= 1 for clause in clauses(fine)
    ), fine
    assert len(clauses(fine.rstrip("."))) == max(len(visible), 1), "one clause each, none to spare"


@pytest.mark.parametrize("name", ["left_eye", "nose", "upper_lip", "right_ear", "skin"])
def test_a_part_counts_from_the_threshold_on_and_not_below(name: str) -> None:
    least = int(np.ceil(MIN_SHARE * SIDE * SIDE))
    word = (
        "face"
        if name == "skin"
        else next(w for w in ("eyes", "ears", "nose", "mouth") if name in REGION_LABELS[w])
    )
    for pixels, expected in ((least - 1, False), (least, True)):
        drawing = draw(frozenset())
        drawing.labels[230, 200 : 200 + pixels] = LABEL_IDS[name]
        assert (word in drawing.measured().regions) is expected


def test_two_halves_of_an_eye_that_are_both_too_small_make_no_eyes() -> None:
    drawing = draw(frozenset({"skin"}))
    for name, row in (("left_eye", 230), ("right_eye", 240)):
        drawing.labels[row, 200 : 200 + int(0.7 * MIN_SHARE * SIDE * SIDE)] = LABEL_IDS[name]
    assert drawing.measured().regions == {"face"}


def test_one_visible_ear_is_still_named_by_the_plural() -> None:
    _, fine = draw(ALL_PARTS - {"left_ear"}).captions()
    assert re.search(r"one of the ears (is visible|shows)", fine)


def test_parts_of_another_person_are_not_taken_for_this_one() -> None:
    drawing = draw(frozenset({"skin", "nose"}))
    drawing.ellipse("left_eye", (30, 60), (18, 9), WHITE)
    drawing.ellipse("glasses", (470, 80), (40, 30), BLACK)
    coarse, fine = drawing.captions()
    assert "eyes" not in words(fine) and "glasses" not in coarse


def test_descriptions_are_short_and_guess_no_sex_age_or_origin(full_records: list[Record]) -> None:
    guesses = {
        "man",
        "woman",
        "boy",
        "girl",
        "he",
        "she",
        "his",
        "her",
        "young",
        "old",
        "male",
        "female",
        "child",
    }
    for coarse, fine in Attributes(AttributesConfig()).caption(full_records):
        assert len(fine) <= 330
        assert len(re.findall(r"\w+|[^\w\s]", fine)) <= 50, "each of these words is one CLIP token"
        assert len(re.findall(r"\w+|[^\w\s]", coarse)) <= 60
        assert not guesses & set(words((coarse + fine).lower()))
        assert re.fullmatch(r"A (close-up )?portrait [^.]+\.( [A-Z][^.]+\.)?", coarse), coarse
        assert re.fullmatch(r"[A-Z][^.]+\.", fine), fine


@pytest.fixture(scope="module")
def full_records() -> list[Record]:
    """Drawings of every pose with everything on, under many keys."""
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


def test_captions_vary_with_the_key_and_with_nothing_else(full_records: list[Record]) -> None:
    backend = Attributes(AttributesConfig())
    assert backend.caption(full_records) == [
        backend.caption([record])[0] for record in full_records
    ]
    drawing = draw()
    assert len({drawing.captions(key_of(str(n)))[1] for n in range(12)}) > 4


# ---------------------------------------------------------------------------- what is said is what


def test_the_size_of_the_picture_changes_no_word() -> None:
    small = draw()
    image = cv2.resize(small.image, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    labels = cv2.resize(small.labels, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    face = Face(
        box=tuple(2 * v for v in small.face.box),  # type: ignore[arg-type]
        landmarks=tuple((2 * x, 2 * y) for x, y in small.landmarks),
        score=1.0,
    )
    assert measure(to_lab(image), labels, face) == small.measured()


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((8, 7, 7), "black"),
        ((45, 28, 18), "dark brown"),
        ((100, 70, 48), "brown"),
        ((140, 110, 82), "light brown"),
        ((215, 180, 125), "blond"),
        ((110, 50, 28), "auburn"),
        ((170, 80, 40), "red"),
        ((135, 135, 137), "grey"),
        ((162, 158, 141), "grey"),
        ((240, 240, 238), "white"),
        ((60, 150, 70), "green"),
    ],
)
def test_hair_is_called_by_its_colour(rgb: tuple[int, int, int], name: str) -> None:
    assert hair_color(tuple(to_lab(np.full((1, 1, 3), rgb, np.uint8))[0, 0])) == name  # type: ignore[arg-type]
    drawing = draw(hair=rgb)
    assert drawing.measured().hair_color == name
    assert f"{name} hair" in drawing.captions()[0]


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((10, 10, 10), "black"),
        ((245, 245, 245), "white"),
        ((128, 128, 128), "grey"),
        ((200, 30, 30), "red"),
        ((30, 60, 160), "blue"),
        ((20, 25, 60), "dark blue"),
        ((150, 180, 220), "light blue"),
        ((40, 130, 50), "green"),
        ((240, 210, 40), "yellow"),
        ((240, 130, 30), "orange"),
        ((240, 150, 180), "pink"),
        ((110, 50, 140), "purple"),
        ((110, 75, 50), "brown"),
        ((215, 195, 165), "beige"),
    ],
)
def test_clothes_are_called_by_their_colour(rgb: tuple[int, int, int], name: str) -> None:
    assert fabric_color(tuple(to_lab(np.full((1, 1, 3), rgb, np.uint8))[0, 0])) == name  # type: ignore[arg-type]
    article = "an" if name[0] in "aeiou" else "a"
    assert f"{article} {name} top" in draw(cloth=rgb).captions()[0]


def test_many_coloured_hair_and_clothes_are_given_no_colour() -> None:
    drawing = draw()
    for label, colors in (
        ("hair", (BLACK, (230, 200, 150))),
        ("cloth", ((200, 30, 30), (30, 60, 160))),
    ):
        rows, columns = np.nonzero(drawing.labels == LABEL_IDS[label])
        drawing.image[rows, columns] = np.where((columns // 40 % 2 == 0)[:, None], *colors)
    measured = drawing.measured()
    assert (measured.hair_color, measured.cloth_color) == ("", "")
    assert "hair" not in drawing.captions()[0] and " top" not in drawing.captions()[0]


def test_cropped_hair_that_shows_the_skin_is_given_no_colour() -> None:
    assert draw(hair=(190, 150, 130)).measured().hair_color == ""


def test_hair_is_long_only_if_it_falls_below_the_chin() -> None:
    drawing = draw()
    assert not drawing.measured().hair_long
    collar = draw()
    # touches nothing on the head: a collar of fur
    collar.box("hair", (100, 412), (430, 500), BROWN)
    assert not collar.measured().hair_long
    for x in (110, 350):
        drawing.box("hair", (x, x + 50), (190, 512), BROWN)
    assert drawing.measured().hair_long
    assert (
        "long brown hair" in drawing.captions()[0]
        and "framed by long hair" in drawing.captions()[1]
    )


def test_a_fringe_covers_the_forehead() -> None:
    drawing = draw()
    drawing.box("hair", (180, 332), (120, 205), BROWN)
    assert drawing.measured().fringe and not draw().measured().fringe
    assert "fringe" in drawing.captions()[0]


def test_glasses_and_dark_glasses() -> None:
    clear = draw(ALL_PARTS - {"left_eye", "right_eye"})
    clear.box("glasses", (165, 347), (210, 255), SKIN)
    dark = draw(ALL_PARTS - {"left_eye", "right_eye"})
    dark.box("glasses", (165, 347), (210, 255), BLACK)
    assert "wearing glasses" in clear.captions()[0] and "behind glasses" in clear.captions()[1]
    assert (
        "wearing dark glasses" in dark.captions()[0] and "behind dark glasses" in dark.captions()[1]
    )
    assert "eyes" not in words(dark.captions()[1]), "no region without pixels"
    assert "glasses" not in draw().captions()[0]


def test_a_hat_sits_on_the_head_and_other_headwear_is_not_called_a_hat() -> None:
    hat = draw()
    hat.box("hat", (110, 402), (40, 165), (150, 30, 30))
    assert "a red hat" in hat.captions()[0]
    hood = draw(ALL_PARTS - {"hair"})
    hood.box("hat", (110, 402), (40, 165), (150, 30, 30))
    for x in (100, 370):
        hood.box("hat", (x, x + 42), (165, 430), (150, 30, 30))
    assert "headwear" in hood.captions()[0] and "hat" not in words(hood.captions()[0])
    band = draw()
    band.box("hat", (130, 382), (130, 165), (150, 30, 30))  # hair above it
    assert "headwear" in band.captions()[0]
    low = draw()
    low.box("hat", (60, 200), (380, 470), (150, 30, 30))
    assert not low.measured().hat


def test_an_earring_glints_and_an_ear_lobe_does_not() -> None:
    lobe, ring, pair = draw(), draw(), draw()
    lobe.box("earring", (130, 144), (280, 300), SKIN)
    for drawing, sides in ((ring, (130,)), (pair, (130, 370))):
        for x in sides:
            drawing.box("earring", (x, x + 14), (280, 300), WHITE)
            drawing.image[280:300, x : x + 14 : 2] = 30
    assert [d.measured().earrings for d in (lobe, ring, pair)] == [0, 1, 2]
    assert "an earring" in ring.captions()[0] and "with an earring" in ring.captions()[1]
    assert "wearing earrings" in pair.captions()[0]


def test_a_necklace_glints_and_a_fold_of_the_neck_does_not() -> None:
    fold, chain = draw(), draw()
    for drawing in (fold, chain):
        drawing.box("necklace", (210, 302), (436, 448), SKIN)
    chain.image[436:448, 210:302:3] = 255
    assert "necklace" not in fold.captions()[0] and "a necklace" in chain.captions()[0]


@pytest.mark.parametrize(
    ("nose_x", "word"),
    [
        (256, None),
        (280, "slightly to the right"),
        (300, "to the right"),
        (230, "slightly to the left"),
    ],
)
def test_the_head_turns_where_the_nose_goes(nose_x: int, word: str | None) -> None:
    drawing = draw()
    drawing.landmarks = (*drawing.landmarks[:2], (nose_x, 290), *drawing.landmarks[3:])
    coarse, fine = drawing.captions()
    if word is None:
        assert "turned" not in coarse and re.search("from the front|to the camera", fine)
    else:
        assert (
            f"The head is turned {word}" in coarse and f"the face is turned {word}" in fine.lower()
        )


def test_a_tilted_head_leans_to_the_side_it_is_rotated_to() -> None:
    drawing = draw()
    # clockwise as seen: the crown goes to the right
    turn = cv2.getRotationMatrix2D((256, 265), -20, 1.0)
    drawing.image = cv2.warpAffine(drawing.image, turn, (SIDE, SIDE), flags=cv2.INTER_NEAREST)
    drawing.labels = cv2.warpAffine(drawing.labels, turn, (SIDE, SIDE), flags=cv2.INTER_NEAREST)
    points = np.array(drawing.landmarks) @ turn[:, :2].T + turn[:, 2]
    drawing.landmarks = tuple((float(x), float(y)) for x, y in points)
    assert "tilted to the right" in drawing.captions()[0]
    assert drawing.measured().regions == set(REGION_WORDS)


def test_a_mirrored_picture_swaps_left_and_right_and_nothing_else() -> None:
    drawing = draw(ALL_PARTS - {"left_ear"})
    drawing.landmarks = ((206, 222), (306, 246), (285, 300), (212, 340), (300, 352))
    mirror = Drawing(np.ascontiguousarray(drawing.image[:, ::-1]), drawing.labels[:, ::-1].copy())
    for left, right in ((2, 3), (4, 5), (7, 8)):
        swapped = mirror.labels.copy()
        mirror.labels[swapped == left], mirror.labels[swapped == right] = right, left
    (a, b, c, d, e) = [(SIDE - 1 - x, y) for x, y in drawing.landmarks]
    mirror.landmarks = (b, a, c, e, d)
    swap = {"left": "right", "right": "left"}
    for one, other in zip(drawing.captions(), mirror.captions(), strict=True):
        assert re.search(r"\b(left|right)\b", one)
        assert re.sub(r"\b(left|right)\b", lambda m: swap[m[0]], one) == other


def with_mouth(half: int, open_rows: int, lift: int, inside: tuple[int, int, int]) -> Measured:
    """A mouth of twice `half` pixels, its corners `lift` above its middle, with `open_rows` rows of
    interior.
    """
    drawing = draw(ALL_PARTS - {"upper_lip", "lower_lip"})
    for x in range(256 - half, 257 + half):
        rise = round(lift * ((x - 256) / half) ** 2)
        gap = round(open_rows * (1 - ((x - 256) / half) ** 2))
        top = 335 - rise
        drawing.box("upper_lip", (x, x + 1), (top - 8, top), LIPS)
        drawing.box("mouth", (x, x + 1), (top, top + gap), inside)
        drawing.box("lower_lip", (x, x + 1), (top + gap, top + gap + 9), LIPS)
    return drawing.measured()


@pytest.mark.parametrize(
    ("half", "open_rows", "lift", "inside", "expected"),
    [
        (40, 0, 0, BLACK, ("closed", False, False)),
        (48, 0, 16, BLACK, ("closed", False, True)),
        (40, 3, 0, BLACK, ("slightly open", False, False)),
        (50, 14, 16, WHITE, ("open", True, True)),
        (32, 12, 0, WHITE, ("open", True, False)),
        (50, 14, 16, BLACK, ("open", False, False)),  # shouting, perhaps
        (40, 50, 0, BLACK, ("wide open", False, False)),
    ],
)
def test_the_mouth(
    half: int,
    open_rows: int,
    lift: int,
    inside: tuple[int, int, int],
    expected: tuple[str, bool, bool],
) -> None:
    measured = with_mouth(half, open_rows, lift, inside)
    assert (measured.mouth, measured.teeth, measured.smile) == expected
    coarse, fine = describe(measured, "0" * 20), describe_face(measured, "0" * 20)
    assert ("smil" in coarse, "smil" in fine) == (measured.smile, measured.smile)
    assert ("teeth" in fine) == measured.teeth


def test_an_even_background_is_named_and_a_busy_one_is_not() -> None:
    even, busy = draw(), draw()
    background = busy.labels == 0
    busy.image[background] = np.random.default_rng(0).integers(0, 255, (int(background.sum()), 3))
    assert "the background is mostly grey" in even.captions()[0].lower()
    assert "background" not in busy.captions()[0]


def test_clothes_are_not_described_where_the_parser_sees_skin_in_them() -> None:
    drawing = draw()
    drawing.box("skin", (100, 400), (455, 512), (200, 90, 40))
    assert not drawing.measured().cloth


# ---------------------------------------------------------------------------- real pictures


@pytest.mark.slow
def test_on_real_portraits_the_words_name_just_the_parsed_regions(portraits: Path) -> None:
    from configs.schema import DatasetConfig
    from stages.base import run_stage
    from stages.chain import build_stages

    records = [
        Record(key=key_of(path.name), source=path.name, image=path.read_bytes())
        for path in sorted(portraits.iterdir())
    ]
    for stage in build_stages(DatasetConfig()):
        if stage.name != "embed":  # captions do without it
            stage.setup()
            records = run_stage(stage, records)
    assert len(records) == 8
    for record in records:
        assert record.ok, (record.reason, record.detail)
        labels = decode_labels(record.parsing)
        named = {word for word in REGION_WORDS if word in words(record.face_caption)}
        assert {"face", "nose", "mouth"} <= named, "all of these portraits show them"
        assert all(
            np.isin(labels, [LABEL_IDS[n] for n in REGION_LABELS[word]]).any() for word in named
        )
        assert decode_jpeg(record.image).shape[:2] == labels.shape
