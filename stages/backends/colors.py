"""Names the colour of a masked part of an image, if the part has a single colour.

It has one if most of its inner pixels are close to its median colour in CIE Lab (D65; L 0-100).
"""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from stages.codec import Image
from stages.regions import Mask

Lab = tuple[float, float, float]
LabImage = npt.NDArray[np.float32]

# half-axes in L, a, b of the ellipsoid around the median: lightness varies more than hue
_NEAR: Final = (22.0, 12.0, 12.0)
# Width of a part's border, in short sides of the image: colours of neighbouring parts mix there.
_EDGE: Final = 0.008
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


def to_lab(image: Image) -> LabImage:
    """RGB uint8 (H, W, 3) → CIE Lab float32 (H, W, 3)."""
    return np.asarray(cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB), np.float32)


def common_color(lab: LabImage, mask: Mask, agreement: float, at_least: int) -> Lab | None:
    """Returns the median colour of the mask's inner pixels, None if they have no common colour.

    agreement: minimum share of the inner pixels that are close to the median. at_least: minimum
    number of inner pixels.
    """
    edge = max(1, round(_EDGE * min(mask.shape)))
    kernel = np.ones((2 * edge + 1, 2 * edge + 1), np.uint8)
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), edge, edge, edge, edge, cv2.BORDER_REPLICATE)
    inner = cv2.erode(padded, kernel)[edge:-edge, edge:-edge] > 0
    pixels = lab[inner]
    if len(pixels) < max(at_least, 1):
        return None
    pixels = pixels[:: 1 + len(pixels) // _MAX_SAMPLE]
    median = np.median(pixels, axis=0)
    near = (((pixels - median) / np.array(_NEAR)) ** 2).sum(axis=1) <= 1
    if near.mean() < agreement:
        return None
    return float(median[0]), float(median[1]), float(median[2])


def hair_color(color: Lab) -> str:
    """Returns the name of a hair colour, "" if it is between the named ones."""
    light, chroma, hue = _polar(color)
    if light < 9 or (light < 15 and chroma < 6):
        return "black"
    if light < 20 and chroma < 10:
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
