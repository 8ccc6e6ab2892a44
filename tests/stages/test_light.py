"""Colours are named relative to the light on the face, on drawn faces in several lights."""

from __future__ import annotations

import numpy as np
import pytest

from bench.attributes import LIGHTS, relit
from stages.backends.colors import fabric_name, hair_color, hair_name, to_lab
from stages.backends.light import Light, estimate_light, to_linear
from stages.regions import LABEL_IDS
from tests.stages.drawing import ALL_PARTS, BLUE, EYES, SKIN, Drawing, draw

HAIR = {
    (8, 7, 7): "black",
    (48, 39, 35): "dark",
    (100, 70, 48): "brown",
    (215, 180, 125): "blond",
    (170, 80, 40): "red",
    (150, 149, 148): "grey",
}
CASTS = ("warmer", "cooler")
FAIR, DARK = (214, 165, 146), (92, 62, 47)


def in_light(drawing: Drawing, light: str) -> Drawing:
    drawing.image = relit(drawing.image, LIGHTS[light])
    return drawing


@pytest.mark.parametrize("light", LIGHTS)
@pytest.mark.parametrize(("rgb", "name"), HAIR.items())
def test_hair_has_its_colour_in_any_light(rgb: tuple[int, int, int], name: str, light: str) -> None:
    named = in_light(draw(hair=rgb), light).appearance().hair_color
    # a cast can make a colour uncertain, never another one
    assert named in ((name, "") if light in CASTS else (name,))


@pytest.mark.parametrize("light", LIGHTS)
@pytest.mark.parametrize("rgb", [(10, 10, 10), (128, 128, 128), (200, 30, 30), BLUE])
def test_clothes_have_their_colour_in_any_light(rgb: tuple[int, int, int], light: str) -> None:
    named = draw(cloth=rgb).appearance().cloth_color
    assert named and in_light(draw(cloth=rgb), light).appearance().cloth_color == named


def test_brown_hair_in_a_dark_photograph_is_not_called_dark() -> None:
    drawing = in_light(draw(hair=(78, 62, 52)), "2 stops darker")
    pixels = np.median(to_lab(drawing.image)[drawing.labels == LABEL_IDS["hair"]], axis=0)
    assert hair_color((pixels[0], pixels[1], pixels[2])) == "dark", "without regard to the light"
    assert drawing.appearance().hair_color == "brown"


def test_pixels_are_named_by_the_light_that_the_eyes_show() -> None:
    lit, in_shade = draw(hair=(55, 44, 39)), draw(hair=(55, 44, 39))
    for drawing, eyes in ((lit, EYES), (in_shade, relit_color(EYES, 0.35))):
        recolor(drawing, SKIN, DARK)
        recolor(drawing, EYES, eyes)
    assert lit.appearance().hair_color == "dark"
    assert in_shade.appearance().hair_color == "brown"


def recolor(drawing: Drawing, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    drawing.image[(drawing.image == before).all(axis=2)] = after


def relit_color(color: tuple[int, int, int], factor: float) -> tuple[int, ...]:
    return tuple(relit(np.array([[color]], np.uint8), (factor, factor, factor))[0, 0].tolist())


@pytest.mark.parametrize("skin", [FAIR, SKIN, DARK])
def test_black_hair_is_dark_on_any_skin(skin: tuple[int, int, int]) -> None:
    drawing = draw(hair=(14, 12, 12))
    recolor(drawing, SKIN, skin)
    assert drawing.appearance().hair_color in ("black", "dark")


def test_fewer_colours_are_certain_without_the_white_of_the_eyes() -> None:
    linear, none = to_linear(draw().image), np.zeros((512, 512), bool)
    skin, eyes = draw().labels == LABEL_IDS["skin"], np.isin(draw().labels, (4, 5))
    with_eyes, without, nothing = (
        estimate_light(linear, skin_mask, {"eyes": eye_mask, "teeth": none}, none).spread[0]
        for skin_mask, eye_mask in ((skin, eyes), (skin, none), (none, none))
    )
    assert with_eyes < 0.7 < without < 1 < nothing


def test_no_colour_is_named_in_a_black_and_white_photograph() -> None:
    drawing = draw(hair=(215, 180, 125))
    grey = to_linear(drawing.image) @ np.array([0.2126, 0.7152, 0.0722], np.float32)
    drawing.image[:] = np.rint(255 * grey[..., None] ** (1 / 2.2))
    appearance = drawing.appearance()
    assert (appearance.hair_color, appearance.cloth_color, appearance.backdrop) == ("", "", "")
    assert "hair" not in drawing.captions()[0] and "a top" not in drawing.captions()[0]


def test_an_uncertain_colour_is_named_by_its_group_or_left_out() -> None:
    hair = lab_color((66, 46, 33))
    cloth = lab_color((150, 180, 220))
    sure, unsure, unknown = (Light((0, 0, 0), (s, s / 5, s / 5)) for s in (0.1, 0.7, 3.0))
    names = [hair_name(hair, light) for light in (sure, unsure, unknown)]
    assert names == ["dark brown", "brown", ""]
    names = [fabric_name(cloth, light) for light in (sure, unsure, unknown)]
    assert names == ["light blue", "blue", ""]
    assert hair_name(None, sure) == "" == fabric_name(None, sure)


def lab_color(rgb: tuple[int, int, int]) -> tuple[float, float, float]:
    light, a, b = to_lab(np.array([[rgb]], np.uint8))[0, 0].tolist()
    return light, a, b


def test_the_estimate_follows_exposure_and_part_of_a_cast() -> None:
    drawing = draw()
    skin, eyes = drawing.labels == LABEL_IDS["skin"], np.isin(drawing.labels, (4, 5))
    none = np.zeros_like(skin)

    def white(light: str = "") -> tuple[float, float, float]:
        image = relit(drawing.image, LIGHTS[light]) if light else drawing.image
        whites = {"eyes": eyes, "teeth": none}
        return estimate_light(to_linear(image), skin, whites, none).white

    ordinary = white()
    assert np.abs(ordinary).max() < 0.1
    assert np.allclose(np.subtract(ordinary, white("2 stops darker")), (2, 0, 0), atol=0.05)
    warmer = np.subtract(white("warmer"), ordinary)
    assert 0.5 * np.log2(1.15) < warmer[1] < np.log2(1.15)
    assert np.log2(0.85) < warmer[2] < 0.5 * np.log2(0.85)


def test_a_face_without_skin_still_gets_a_caption() -> None:
    assert draw(ALL_PARTS - {"skin", "nose"}).captions()[0]
