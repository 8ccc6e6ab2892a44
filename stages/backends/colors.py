"""Names the colour of a masked part of an image, if the part has a single colour.

It has one if most of its inner pixels are close to its median colour in CIE Lab (D65; L 0-100).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from stages.backends.light import Light, LinearImage, to_linear
from stages.codec import Image
from stages.regions import Mask

Lab = tuple[float, float, float]
LabImage = npt.NDArray[np.float32]

# half-axes in L, a, b of the ellipsoid around the median: lightness varies more than hue
_NEAR: Final = (22.0, 12.0, 12.0)
# Width of a part's border, in short sides of the image: colours of neighbouring parts mix there.
_EDGE: Final = 0.008
# Probability that the name of a colour must have to be used.
CONFIDENCE: Final = 0.65
# Deviation, in stops, of the light on hair or clothes from that on the face.
_SHADING: Final = 0.35
# equally likely deviates of a normal distribution
_NINTHS: Final = (-1.593, -0.967, -0.589, -0.282, 0.0, 0.282, 0.589, 0.967, 1.593)
_THIRDS: Final = (-0.967, 0.0, 0.967)
# group name → names of hair_color or fabric_color that it covers; used where these are ambiguous
HAIR_GROUPS: Final = {
    "dark": frozenset({"black", "dark", "dark brown"}),
    "brown": frozenset({"dark brown", "brown", "light brown"}),
    "light": frozenset({"light brown", "blond"}),
    "red": frozenset({"auburn", "red"}),
    "grey": frozenset({"grey", "white"}),
}
_MAX_SAMPLE: Final = 5000  # pixels; enough for a median

# (hue angle in Lab, in degrees, below which the name applies; name)
_HUES: Final = (
    (20.0, "pink"),
    (48.0, "red"),
    (72.0, "orange"),
    (105.0, "yellow"),
    (175.0, "green"),
    (230.0, "teal"),
    (298.0, "blue"),
    (335.0, "purple"),
    (360.0, "pink"),
)
_TONES: Final = ("grey", *dict.fromkeys(name for _, name in _HUES))
FABRIC_GROUPS: Final = {
    **{name: frozenset({name, f"dark {name}", f"light {name}"}) for name in _TONES},
    "brown": frozenset({"brown", "dark brown"}),
    "dark": frozenset({"black", "dark brown", *(f"dark {name}" for name in _TONES)}),
    "light": frozenset({"white", "beige", *(f"light {name}" for name in _TONES)}),
}


# RGB → XYZ divided by its white point (D65)
_TO_XYZ: Final = (
    np.array(
        [
            [0.412453, 0.357580, 0.180423],
            [0.212671, 0.715160, 0.072169],
            [0.019334, 0.119193, 0.950227],
        ]
    )
    / np.array([[0.950456], [1.0], [1.088754]])
).T
_FROM_XYZ: Final = np.linalg.inv(_TO_XYZ)


def to_lab(image: Image) -> LabImage:
    """RGB uint8 (H, W, 3), sRGB → CIE Lab float32 (H, W, 3)."""
    return lab_of(to_linear(image))


def lab_of(linear: LinearImage) -> LabImage:
    """Linear RGB float32 (..., 3), which may exceed 1 → CIE Lab float32 (..., 3)."""
    xyz = linear @ _TO_XYZ.astype(np.float32)
    t = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = t[..., 0], t[..., 1], t[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1).astype(np.float32)


def _linear_of(color: Lab) -> npt.NDArray[np.float64]:
    light, a, b = color
    y = (light + 16) / 116
    t = np.array([y + a / 500, y, y - b / 200])
    xyz = np.where(t > 0.206893, t**3, (t - 16 / 116) / 7.787)
    return np.asarray(np.maximum(xyz @ _FROM_XYZ, 0))


def hair_name(color: Lab | None, light: Light) -> str:
    """Returns the name of a hair colour in `light`, see `_sure_name`; "" for None."""
    return _sure_name(color, light, hair_color, HAIR_GROUPS)


def fabric_name(color: Lab | None, light: Light) -> str:
    """Returns the name of a colour of clothes, hats and backgrounds in `light`, see `_sure_name`;
    "" for None.
    """
    return _sure_name(color, light, fabric_color, FABRIC_GROUPS)


def _sure_name(
    color: Lab | None,
    light: Light,
    name_of: Callable[[Lab], str],
    groups: Mapping[str, frozenset[str]],
) -> str:
    """Returns the name that `color` has with a probability of at least CONFIDENCE, since the light
    may differ from its estimate; else that of the likeliest group of names; "" if that is uncertain
    too.

    color: corrected for `light`. groups: name → names of colours that it covers.
    """
    if color is None or not light.is_colored:
        return ""
    green, red, blue = light.spread
    offsets = np.array([(g, r, b) for g in _NINTHS for r in _THIRDS for b in _THIRDS])
    offsets *= (float(np.hypot(green, _SHADING)), red, blue)
    offsets[:, 1:] += offsets[:, :1]
    gains = np.exp2(offsets[:, (1, 0, 2)])
    possible = lab_of((_linear_of(color) * gains).astype(np.float32)).tolist()
    counts = Counter(name_of((lightness, a, b)) for lightness, a, b in possible)
    for candidates in (
        {name: count for name, count in counts.items() if name},
        {name: sum(counts[member] for member in members) for name, members in groups.items()},
    ):
        best = max(candidates, key=lambda name: (candidates[name], name), default="")
        if best and candidates[best] >= CONFIDENCE * len(possible):
            return best
    return ""


def common_color(lab: LabImage, mask: Mask, agreement: float, at_least: int) -> Lab | None:
    """Returns the mean colour of the mask's inner pixels that are close to their median, None if
    they have no common colour.

    agreement: minimum share of the inner pixels that are close to the median. at_least: minimum
    number of inner pixels.
    """
    pixels = lab[inner(mask)]
    if len(pixels) < max(at_least, 1):
        return None
    pixels = pixels[:: 1 + len(pixels) // _MAX_SAMPLE]
    median = np.median(pixels, axis=0)
    near = (((pixels - median) / np.array(_NEAR)) ** 2).sum(axis=1) <= 1
    if near.mean() < agreement:
        return None
    # finer than the median, which in a dark image is one of few values of 8 bits
    mean = pixels[near].mean(axis=0)
    return float(mean[0]), float(mean[1]), float(mean[2])


def inner(mask: Mask) -> Mask:
    """Returns the mask (H, W) without its border, where colours of neighbouring parts mix."""
    edge = max(1, round(_EDGE * min(mask.shape)))
    kernel = np.ones((2 * edge + 1, 2 * edge + 1), np.uint8)
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), edge, edge, edge, edge, cv2.BORDER_REPLICATE)
    eroded: Mask = cv2.erode(padded, kernel)[edge:-edge, edge:-edge] > 0
    return eroded


def hair_color(color: Lab) -> str:
    """Returns the name of a hair colour, "" if it is between the named ones."""
    light, chroma, hue = _polar(color)
    if light < 9 or (light < 15 and chroma < 6):
        return "black"
    if (light < 20 and chroma < 10) or (light < 30 and chroma < 8):
        return "dark"
    if chroma < 8 or (chroma < 11 and light >= 45):
        return "" if light < 45 else "grey" if light < 76 else "white"
    if not 25 <= hue < 110:
        return fabric_color(color) if chroma > 22 else ""
    if light < 62 and ((hue < 58 and chroma >= 24) or (hue < 42 and chroma >= 16)):
        return "red" if chroma >= 36 and light >= 32 else "auburn"
    if hue >= 58 and chroma >= 22 and light >= 42:
        return "blond"
    for limit, name in ((25, "dark brown"), (42, "brown"), (55, "light brown")):
        if light < limit and chroma < 22 + light / 4:
            return name
    return "blond" if hue >= 58 and chroma >= 15 and light >= 42 else ""


def fabric_color(color: Lab) -> str:
    """Returns the name of a colour of clothes, hats and backgrounds."""
    light, chroma, hue = _polar(color)
    if light < 6 or (light < 20 and chroma < 10):
        return "black"
    if chroma < 11:
        greys = ((40, "dark grey"), (66, "grey"), (82, "light grey"))
        return next((name for limit, name in greys if light < limit), "white")
    if 35 <= hue < 95 and chroma < 30 and light >= 62:
        return "beige"
    if 30 <= hue < 90 and chroma < (45 if hue >= 45 else 25) and light < 62:
        return "dark brown" if light < 28 else "brown"
    name = next(name for limit, name in _HUES if hue < limit)
    if name == "pink" and light < 50:
        name = "red" if hue < 20 else "purple"
    if light < 27:
        return f"dark {name}"
    if light > 70 and name not in ("yellow", "pink", "orange"):
        return f"light {name}"
    return name


def _polar(color: Lab) -> tuple[float, float, float]:
    """Returns (lightness 0-100, chroma, hue in degrees)."""
    light, a, b = color
    return light, float(np.hypot(a, b)), float(np.degrees(np.arctan2(b, a)) % 360)
