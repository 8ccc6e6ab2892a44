"""Estimates the light on a face, so that colours are named relative to it.

A dark photograph of fair skin and a bright one of dark skin can have the same pixels. So the light
is estimated from several surfaces whose reflectance is roughly the same in all people, each with
its uncertainty: skin (lightness differs by several stops between people, its colour little), the
white of the eyes and teeth (much the same, but often in shade), and the brightest parts of the
surroundings (not more than white, unless they are lit by more light than the face). How bright the
whole image is, is no evidence: exposure doesn't change the result.

All values are log2: of linear green, and of red and blue relative to green. A stop of exposure is 1
in green, and a colour cast is a shift of red and blue. Means and deviations are of portraits with
ordinary exposure and white balance, for which the estimated light is about 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from stages.codec import Image
from stages.regions import Mask

LinearImage = npt.NDArray[np.float32]
Values = npt.NDArray[np.float64]

# Skin: green, red/green, blue/green of fair to dark skin in white light, and their deviations.
# Darker skin is redder, by _MELANIN for each stop.
_SKIN: Final = np.array([-1.9, 0.95, -0.45])
_SKIN_SPREAD: Final = (0.9, 0.2)
_MELANIN: Final = np.array([-0.2, 0.15])
# The white of the eyes and teeth. Shade makes them darker and nothing makes them lighter, so a
# reading that is brighter than expected says more than one that is darker.
_WHITES: Final = {
    "eyes": np.array([-1.3, 0.3, -0.08]),
    "teeth": np.array([-0.9, 0.2, -0.28]),
}
_WHITE_SPREAD: Final = (0.5, 0.2)
_IN_SHADE: Final = 0.9  # deviation of green if the reading is darker than expected
_LESS_RED: Final = 0.4  # the least difference from skin, below which it is lid, lip or tongue
_BRIGHT: Final = (85, 97)  # percentiles of the mask's pixels: without iris, lashes and reflections
_MIN_WHITE: Final = 30  # pixels of the mask
# The bright parts of the surroundings (taken as white). For lightness they count if they would be
# lighter than white, for the cast if they are nearly white.
_AROUND_SPREAD: Final = (1.2, 0.2)
_SAME_LIGHT: Final = 0.7  # largest difference of red or blue from the light estimated without them
# Casts of photographs after the camera's own white balance.
_CAST_SPREAD: Final = 0.3
# Skin whose red and blue differ more than this from ordinary skin is in a black-and-white picture
# or in monochromatic light. No colour is named then.
_NO_COLOR: Final = 0.75

_LINEAR: Final = np.array(
    [v / 255 / 12.92 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in range(256)],
    np.float32,
)
_MAX_SAMPLE: Final = 5000  # pixels; enough for a percentile
_DARKEST: Final = 2e-4  # of linear light: below it, 8 bits hold no colour


@dataclass(frozen=True, slots=True)
class Light:
    """The light on a face: log2 of green, red/green and blue/green of a white surface in it.

    spread: standard deviations of the three. is_colored: False if the image has no colours that
    could be named.
    """

    white: tuple[float, float, float]
    spread: tuple[float, float, float]
    is_colored: bool = True


def to_linear(image: Image) -> LinearImage:
    """RGB uint8 (H, W, 3), sRGB → linear light float32 (H, W, 3), 0 to 1."""
    return _LINEAR[image]


def estimate_light(
    linear: LinearImage, skin: Mask, whites: Mapping[str, Mask], surroundings: Mask
) -> Light:
    """Returns the light on a face. Scaling `linear` by a factor shifts green by its log2.

    linear: (H, W, 3). skin: of the face. whites: masks of "eyes" and "teeth", which may contain
    other things too. surroundings: clothes and background. Masks may be empty. Without skin the
    light is ordinary and unknown by two stops.
    """
    if not skin.any():
        return Light((0.0, 0.0, 0.0), (2.0, _CAST_SPREAD, _CAST_SPREAD))
    face = _values(linear[skin])
    readings = [
        brightest - mean
        for name, mean in _WHITES.items()
        if (brightest := _brightest(linear, whites[name])) is not None
        and brightest[1] < face[1] - _LESS_RED
    ]
    around = _brightest(linear, surroundings)
    green, green_spread = _lightness(face, readings, around)
    skin_red_blue = _SKIN[1:] + _MELANIN * (face[0] - green - _SKIN[0])
    estimates = [
        (np.zeros(2), _CAST_SPREAD),
        (face[1:] - skin_red_blue, _SKIN_SPREAD[1]),
        *((reading[1:], _WHITE_SPREAD[1]) for reading in readings),
    ]
    (red, blue), spread = _combined(estimates)
    if around is not None and np.abs(around[1:] - (red, blue)).max() < _SAME_LIGHT:
        (red, blue), spread = _combined([*estimates, (around[1:], _AROUND_SPREAD[1])])
    return Light(
        (green, float(red), float(blue)),
        (green_spread, spread, spread),
        bool(np.abs(face[1:] - skin_red_blue).max() < _NO_COLOR),
    )


def _lightness(
    face: Values, readings: Sequence[Values], around: Values | None
) -> tuple[float, float]:
    from_skin = face[0] - _SKIN[0]
    estimates = [(from_skin, _SKIN_SPREAD[0])]
    for reading in readings:
        estimates.append((reading[0], _WHITE_SPREAD[0] if reading[0] > from_skin else _IN_SHADE))
    green, spread = _combined(estimates)
    if around is not None and around[0] > green:
        green, spread = _combined([*estimates, (around[0], _AROUND_SPREAD[0])])
    return float(green), spread


def in_light(linear: LinearImage, light: Light) -> LinearImage:
    """Returns the image (H, W, 3) as it would be in ordinary white light. What is lit by more light
    than the face can exceed 1.
    """
    green, red, blue = light.white
    return linear * np.exp2(-np.array([green + red, green, green + blue], np.float32))


def _values(pixels: npt.NDArray[np.float32]) -> Values:
    """Returns log2 of green, red/green, blue/green of the middle half of linear pixels (N, 3)."""
    pixels = pixels[:: 1 + len(pixels) // _MAX_SAMPLE]
    middle = np.sort(pixels, axis=0)[len(pixels) // 4 : -(-3 * len(pixels) // 4)]
    red, green, blue = np.log2(np.maximum(middle.mean(axis=0, dtype=np.float64), _DARKEST))
    return np.array([green, red - green, blue - green])


def _brightest(linear: LinearImage, mask: Mask) -> Values | None:
    """Returns the values of the mask's bright pixels; None if it is too small."""
    pixels = linear[mask]
    if len(pixels) < _MIN_WHITE:
        return None
    pixels = pixels[:: 1 + len(pixels) // _MAX_SAMPLE]
    low, high = np.percentile(pixels[:, 1], _BRIGHT)
    return _values(pixels[(pixels[:, 1] >= low) & (pixels[:, 1] <= high)])


def _combined(estimates: Sequence[tuple[Any, float]]) -> tuple[Any, float]:
    """Returns (mean, deviation) of independent estimates (mean, deviation) of a value or array."""
    weights = [1 / spread**2 for _, spread in estimates]
    mean = sum(w * value for w, (value, _) in zip(weights, estimates, strict=True)) / sum(weights)
    return mean, float(sum(weights) ** -0.5)
