"""The appearance that `attributes` captions are composed from, on drawn faces, and the words for
it.
"""

from __future__ import annotations

import re

import cv2
import numpy as np
import pytest

from stages.backends.appearance import MIN_SHARE, Appearance, measure_appearance
from stages.backends.attributes import compose_caption, compose_face_caption
from stages.backends.colors import fabric_color, hair_color, to_lab
from stages.record import Face
from stages.regions import LABEL_IDS, REGION_LABELS, REGION_WORDS
from tests.stages.drawing import (
    ALL_PARTS,
    BLACK,
    BROWN,
    LIPS,
    SIDE,
    SKIN,
    TONGUE,
    WHITE,
    Drawing,
    draw,
)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


@pytest.mark.parametrize("name", ["left_eye", "nose", "upper_lip", "right_ear", "skin"])
def test_a_part_is_visible_if_it_has_the_minimum_size(name: str) -> None:
    minimum = int(np.ceil(MIN_SHARE * SIDE * SIDE))
    small_regions = ("eyes", "ears", "nose", "mouth")
    region = next((word for word in small_regions if name in REGION_LABELS[word]), "face")
    for pixels, is_visible in ((minimum - 1, False), (minimum, True)):
        drawing = draw(frozenset())
        drawing.labels[230, 200 : 200 + pixels] = LABEL_IDS[name]
        assert (region in drawing.appearance().regions) is is_visible


def test_two_eyes_that_are_both_too_small_do_not_count_together() -> None:
    drawing = draw(frozenset({"skin"}))
    for name, row in (("left_eye", 230), ("right_eye", 240)):
        drawing.labels[row, 200 : 200 + int(0.7 * MIN_SHARE * SIDE * SIDE)] = LABEL_IDS[name]
    assert drawing.appearance().regions == {"face"}


def test_parts_of_another_person_are_ignored() -> None:
    drawing = draw(frozenset({"skin", "nose"}))
    drawing.ellipse("left_eye", (30, 60), (18, 9), WHITE)
    drawing.ellipse("glasses", (470, 80), (40, 30), BLACK)
    coarse, fine = drawing.captions()
    assert "eyes" not in words(fine) and "glasses" not in coarse


def test_appearance_does_not_depend_on_the_size_of_the_image() -> None:
    small = draw()
    image = cv2.resize(small.image, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    labels = cv2.resize(small.labels, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    face = Face(
        box=tuple(2 * v for v in small.face.box),  # type: ignore[arg-type]
        landmarks=tuple((2 * x, 2 * y) for x, y in small.landmarks),
        score=1.0,
    )
    assert measure_appearance(image, labels, face) == small.appearance()


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
def test_names_of_hair_colours(rgb: tuple[int, int, int], name: str) -> None:
    assert hair_color(tuple(to_lab(np.full((1, 1, 3), rgb, np.uint8))[0, 0])) == name  # type: ignore[arg-type]
    drawing = draw(hair=rgb)
    # in a photograph of unknown exposure, light brown and blond can't be told apart
    name = "light" if name == "light brown" else name
    assert drawing.appearance().hair_color == name
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
def test_names_of_colours_of_clothes(rgb: tuple[int, int, int], name: str) -> None:
    assert fabric_color(tuple(to_lab(np.full((1, 1, 3), rgb, np.uint8))[0, 0])) == name  # type: ignore[arg-type]
    name = "blue" if name == "light blue" else name  # how light it is is uncertain
    article = "an" if name[0] in "aeiou" else "a"
    assert f"{article} {name} top" in draw(cloth=rgb).captions()[0]


def test_multicoloured_hair_and_clothes_get_no_colour() -> None:
    drawing = draw()
    for label, colors in (
        ("hair", (BLACK, (230, 200, 150))),
        ("cloth", ((200, 30, 30), (30, 60, 160))),
    ):
        rows, columns = np.nonzero(drawing.labels == LABEL_IDS[label])
        drawing.image[rows, columns] = np.where((columns // 40 % 2 == 0)[:, None], *colors)
    appearance = drawing.appearance()
    assert (appearance.hair_color, appearance.cloth_color) == ("", "")
    assert "hair" not in drawing.captions()[0] and " top" not in drawing.captions()[0]


def test_cropped_hair_of_the_skins_colour_gets_no_colour() -> None:
    assert draw(hair=(190, 150, 130)).appearance().hair_color == ""


def test_hair_is_long_if_it_reaches_below_the_chin() -> None:
    drawing = draw()
    assert not drawing.appearance().hair_long
    collar = draw()
    # not connected with the head: a fur collar
    collar.box("hair", (100, 412), (430, 500), BROWN)
    assert not collar.appearance().hair_long
    for x in (110, 350):
        drawing.box("hair", (x, x + 50), (190, 512), BROWN)
    assert drawing.appearance().hair_long
    coarse, fine = drawing.captions()
    assert "long brown hair" in coarse and "framed by long hair" in fine


def test_a_fringe_covers_the_forehead() -> None:
    drawing = draw()
    drawing.box("hair", (180, 332), (120, 205), BROWN)
    assert drawing.appearance().fringe and not draw().appearance().fringe
    assert "fringe" in drawing.captions()[0]


def test_glasses_and_dark_glasses() -> None:
    clear = draw(ALL_PARTS - {"left_eye", "right_eye"})
    clear.box("glasses", (165, 347), (210, 255), SKIN)
    dark = draw(ALL_PARTS - {"left_eye", "right_eye"})
    dark.box("glasses", (165, 347), (210, 255), BLACK)
    assert "wearing glasses" in clear.captions()[0] and "behind glasses" in clear.captions()[1]
    coarse, fine = dark.captions()
    assert "wearing dark glasses" in coarse and "behind dark glasses" in fine
    assert "eyes" not in words(fine), "a region without pixels"
    assert "glasses" not in draw().captions()[0]


def test_a_hat_is_on_top_of_the_head_and_other_headwear_is_not_called_a_hat() -> None:
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
    assert not low.appearance().hat


def test_an_earring_has_highlights_and_an_ear_lobe_has_none() -> None:
    lobe, ring, pair = draw(), draw(), draw()
    lobe.box("earring", (130, 144), (280, 300), SKIN)
    for drawing, sides in ((ring, (130,)), (pair, (130, 370))):
        for x in sides:
            drawing.box("earring", (x, x + 14), (280, 300), WHITE)
            drawing.image[280:300, x : x + 14 : 2] = 30
    assert [d.appearance().earrings for d in (lobe, ring, pair)] == [0, 1, 2]
    assert "an earring" in ring.captions()[0] and "with an earring" in ring.captions()[1]
    assert "wearing earrings" in pair.captions()[0]


def test_a_necklace_has_highlights_and_a_fold_of_the_neck_has_none() -> None:
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
def test_the_head_is_turned_to_the_side_of_the_nose(nose_x: int, word: str | None) -> None:
    drawing = draw()
    drawing.landmarks = (*drawing.landmarks[:2], (nose_x, 290), *drawing.landmarks[3:])
    coarse, fine = drawing.captions()
    if word is None:
        assert "turned" not in coarse and re.search("from the front|to the camera", fine)
    else:
        assert f"The head is turned {word}" in coarse
        assert f"the face is turned {word}" in fine.lower()


def test_a_head_is_tilted_to_the_side_it_is_rotated_to() -> None:
    drawing = draw()
    # clockwise as the viewer sees it: the crown moves to the right
    turn = cv2.getRotationMatrix2D((256, 265), -20, 1.0)
    drawing.image = cv2.warpAffine(drawing.image, turn, (SIDE, SIDE), flags=cv2.INTER_NEAREST)
    drawing.labels = cv2.warpAffine(drawing.labels, turn, (SIDE, SIDE), flags=cv2.INTER_NEAREST)
    points = np.array(drawing.landmarks) @ turn[:, :2].T + turn[:, 2]
    drawing.landmarks = tuple((float(x), float(y)) for x, y in points)
    assert "tilted to the right" in drawing.captions()[0]
    assert drawing.appearance().regions == set(REGION_WORDS)


def test_mirroring_swaps_left_and_right_and_nothing_else() -> None:
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


def with_mouth(half: int, open_rows: int, lift: int, inside: tuple[int, int, int]) -> Appearance:
    """The appearance of a face with a drawn mouth: 2 * `half` pixels wide, its corners `lift`
    pixels above its middle, its interior `open_rows` pixels high and of the colour `inside`.
    """
    drawing = draw(ALL_PARTS - {"upper_lip", "lower_lip"})
    for x in range(256 - half, 257 + half):
        rise = round(lift * ((x - 256) / half) ** 2)
        gap = round(open_rows * (1 - ((x - 256) / half) ** 2))
        top = 335 - rise
        drawing.box("upper_lip", (x, x + 1), (top - 8, top), LIPS)
        drawing.box("mouth", (x, x + 1), (top, top + gap), inside)
        drawing.box("lower_lip", (x, x + 1), (top + gap, top + gap + 9), LIPS)
    return drawing.appearance()


@pytest.mark.parametrize(
    ("half", "open_rows", "lift", "inside", "expected"),
    [
        (40, 0, 0, BLACK, ("closed", False, False)),
        (48, 0, 16, BLACK, ("closed", False, True)),
        (40, 3, 0, BLACK, ("slightly open", False, False)),
        (50, 14, 16, WHITE, ("open", True, True)),
        (32, 12, 0, WHITE, ("open", True, False)),
        (50, 14, 16, BLACK, ("open", False, False)),  # perhaps shouting
        (40, 50, 0, BLACK, ("wide open", False, False)),
        (50, 14, 16, TONGUE, ("open", False, False)),
        (50, 6, 16, TONGUE, ("slightly open", False, False)),
    ],
)
def test_mouth_teeth_and_smile(
    half: int,
    open_rows: int,
    lift: int,
    inside: tuple[int, int, int],
    expected: tuple[str, bool, bool],
) -> None:
    appearance = with_mouth(half, open_rows, lift, inside)
    assert (appearance.mouth, appearance.teeth, appearance.smile) == expected
    coarse, fine = compose_caption(appearance, "0" * 20), compose_face_caption(appearance, "0" * 20)
    assert ("smil" in coarse, "smil" in fine) == (appearance.smile, appearance.smile)
    assert ("teeth" in fine) == appearance.teeth


@pytest.mark.parametrize("rows", [9, 90])
def test_a_tongue_that_is_labelled_as_lip_is_not_a_smile(rows: int) -> None:
    drawing = draw(ALL_PARTS - {"upper_lip", "lower_lip"})
    for x in range(208, 305):
        top = 335 - round(16 * ((x - 256) / 48) ** 2)
        drawing.box("upper_lip", (x, x + 1), (top - 8, top), LIPS)
        drawing.box("lower_lip", (x, x + 1), (top, top + 9), LIPS)
    drawing.box("lower_lip", (226, 286), (344, 344 + rows), TONGUE)
    assert drawing.appearance().smile is (rows < 90)


@pytest.mark.parametrize("cloth", [WHITE, (225, 205, 185), (205, 165, 140)])
def test_a_bandage_is_not_a_hat_and_a_pale_hat_has_a_brim_or_is_tall(
    cloth: tuple[int, int, int],
) -> None:
    bandage, tall, brimmed, cap = draw(), draw(), draw(), draw()
    bandage.box("hat", (140, 372), (110, 175), cloth)
    tall.box("hat", (140, 372), (0, 175), cloth)
    tall.landmarks = ((216, 230), (296, 230), (256, 280), (222, 320), (290, 320))
    brimmed.box("hat", (140, 372), (60, 150), cloth)
    brimmed.box("hat", (96, 416), (150, 170), cloth)
    cap.box("hat", (140, 372), (60, 175), (150, 30, 30))
    assert [d.appearance().hat for d in (bandage, tall, brimmed, cap)] == [False, True, True, True]
    assert not {"hat", "headwear"} & set(words(bandage.captions()[0]))


def test_an_even_background_is_named_and_a_varied_one_is_not() -> None:
    even, busy = draw(), draw()
    background = busy.labels == 0
    busy.image[background] = np.random.default_rng(0).integers(0, 255, (int(background.sum()), 3))
    assert "the background is mostly grey" in even.captions()[0].lower()
    assert "background" not in busy.captions()[0]


def test_clothes_are_ignored_if_the_parser_finds_skin_in_them() -> None:
    drawing = draw()
    drawing.box("skin", (100, 400), (455, 512), (200, 90, 40))
    assert not drawing.appearance().cloth
