"""Measures a person's appearance for the `attributes` captions: visible parts, colours, pose and
expression, from an image and its label map.

Lengths are in units of the face (distances between landmarks), so results don't depend on the
image's size. All thresholds are defined here. "left" and "right" are the viewer's. A field with its
default value means "unknown", never "absent".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt

from stages.backends.colors import LabImage, common_color, fabric_name, hair_name, inner, lab_of
from stages.backends.light import Light, estimate_light, in_light, to_linear
from stages.codec import Image, LabelMap
from stages.record import Face
from stages.regions import LABEL_IDS, REGION_LABELS, REGION_WORDS, Mask

# Shares are of the image's pixels. A part smaller than one of the first two isn't mentioned.
MIN_PIXELS: Final = 16
MIN_SHARE: Final = 0.0002
# larger for glasses, hats and clothes, which the parser sometimes finds where there are none
MIN_WORN: Final = 0.001
MIN_HAIR: Final = 0.005
MIN_EAR: Final = 0.0006  # a smaller ear isn't counted

# horizontal offset of the nose from the middle of the eyes, in eye distances, from which the head
# is turned slightly, clearly, and in profile
TURNED: Final = (0.14, 0.34, 0.8)
TILTED: Final = 11.0  # degrees between the line through the eyes and the horizontal
# nose's position between the eyes (0) and the mouth (1): raised below the first, lowered above the
# second
PITCHED: Final = (0.38, 0.80)

# Jewellery, in L of CIE Lab (0-100): minimum of the brightest pixel, then minimum spread from
# percentile 5 to 95 for earrings and for necklaces. Skin is darker or more even.
GLINT: Final = (75.0, 45.0, 30.0)
MIN_EARRING: Final = 0.0003  # on one side
MIN_NECKLACE: Final = 0.0012
# share of the mouth's area that is its interior, from which it is slightly open, open, wide open
MOUTH_OPEN: Final = (0.04, 0.2, 0.5)
LIKE_SKIN: Final = 15.0  # Lab distance below which hair can't be distinguished from the scalp
TEETH: Final = 0.3  # share of the interior that is brighter and less red than the lips
# A tongue shows: share of the interior that is neither darker nor less red than the lips, or how
# many times larger the lower lip is than the upper one (the parser labels a tongue on it as lip).
TONGUE: Final = (0.4, 4.0)
# Redness (a of Lab) as a part of the lips': teeth are below the first, a tongue above the second.
REDNESS: Final = (0.6, 0.75)
# lift of the corners in mouth widths, plus a quarter of the width beyond SMILE_WIDTH face sizes
SMILE: Final = 0.08
SMILE_WIDTH: Final = 0.8
# White or skin-coloured cloth on the head may be a bandage. It is a hat if it is wider than the
# face by this factor (a brim), or rises to this height (face sizes above the eyes).
HAT_SHAPE: Final = (1.4, 2.3)
# minimum L, and maximum distance in a, b from the colours between white and the skin's
PALE: Final = (60.0, 12.0)
NARROWED: Final = 0.19  # an eye's area divided by the square of its width


@dataclass(frozen=True, slots=True, kw_only=True)
class Appearance:
    """What can be said of the main face of an image."""

    regions: frozenset[str]  # of REGION_WORDS
    eyes: int = 0  # number clearly visible
    ears: int = 0
    narrowed: bool = False  # the eyes
    dark_brows: bool = False
    close_up: bool = False
    turned: int = 0  # -1 slightly to the left, -2 clearly, -3 in profile; 1, 2, 3 to the right
    tilted: int = 0  # -1 to the left, 1 to the right
    pitched: int = 0  # -1 down, 1 up
    hair: bool = False
    hair_color: str = ""
    hair_long: bool = False  # reaches below the chin
    fringe: bool = False
    hat: bool = False  # a hat or other headwear
    # not a hat: it covers the sides of the face (a scarf, a hood) or leaves the crown free
    headwear: bool = False
    hat_color: str = ""
    glasses: bool = False
    dark_glasses: bool = False
    earrings: int = 0  # number visible
    necklace: bool = False
    cloth: bool = False
    cloth_color: str = ""
    backdrop: str = ""  # colour of an even background
    mouth: str = ""  # closed, slightly open, open, wide open; "" if unknown
    teeth: bool = False
    smile: bool = False


@dataclass(frozen=True, slots=True)
class Frame:
    """A coordinate system of the face, from its landmarks in pixels."""

    origin: npt.NDArray[np.float64]  # (2,) middle of the eyes
    across: npt.NDArray[np.float64]  # (2,) unit vector from the viewer's left to the right eye
    down: npt.NDArray[np.float64]  # (2,) unit vector from the eyes towards the mouth
    eye_distance: float  # pixels
    eyes_to_mouth: float  # pixels
    roll: float  # degrees, clockwise positive
    nose: tuple[float, float]  # (across in eye distances, down in eyes-to-mouth distances)

    @property
    def size(self) -> float:
        """The face's size in pixels; it hardly changes when the head turns."""
        return max(self.eye_distance, self.eyes_to_mouth)

    def coordinates(self, mask: Mask) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Returns (across, down), each (N,), of the mask's N pixels in units of `size`."""
        rows, columns = np.nonzero(mask)
        offset = np.stack([columns, rows], axis=1) - self.origin
        return offset @ self.across / self.size, offset @ self.down / self.size


def frame_of(face: Face) -> Frame:
    """Returns the coordinate system of a face with five landmarks."""
    points = np.array(face.landmarks, np.float64)
    left, right, nose, mouth = points[0], points[1], points[2], points[3:].mean(axis=0)
    across = right - left
    distance = float(max(np.hypot(*across), 1e-6))
    across = across / distance
    down = np.array([-across[1], across[0]])
    origin = (left + right) / 2
    depth = float(max((mouth - origin) @ down, 1e-6))
    return Frame(
        origin=origin,
        across=across,
        down=down,
        eye_distance=distance,
        eyes_to_mouth=depth,
        roll=float(np.degrees(np.arctan2(across[1], across[0]))),
        nose=(float((nose - origin) @ across) / distance, float((nose - origin) @ down) / depth),
    )


class _Parts:
    """Masks of a label map's parts around one face. Parts that are too small count as absent."""

    def __init__(self, labels: LabelMap, face: Face) -> None:
        self.labels = labels
        self.total = labels.size
        x1, y1, x2, y2 = face.box
        self.width, self.height = max(x2 - x1, 1.0), max(y2 - y1, 1.0)
        self.box = (x1, y1, x2, y2)

    def near(
        self, *names: str, sides: float, up: float, down: float, share: float = MIN_SHARE
    ) -> Mask:
        """Returns the mask (H, W) of the labels `names` inside the face's box, enlarged.

        sides, up, down: by which part of its width or height the box is enlarged. Empty if the mask
        has less than MIN_PIXELS pixels or than `share` of the image.
        """
        x1, y1, x2, y2 = self.box
        rows = _span(y1 - up * self.height, y2 + down * self.height, self.labels.shape[0])
        columns = _span(x1 - sides * self.width, x2 + sides * self.width, self.labels.shape[1])
        mask = np.zeros(self.labels.shape, bool)
        wanted = np.zeros(256, bool)
        wanted[[LABEL_IDS[name] for name in names]] = True
        mask[rows, columns] = wanted[self.labels[rows, columns]]
        return mask if mask.sum() >= max(MIN_PIXELS, share * self.total) else np.zeros_like(mask)

    def on_face(self, *names: str, share: float = MIN_SHARE) -> Mask:
        return self.near(*names, sides=0.25, up=0.25, down=0.25, share=share)

    def is_visible(self, word: str) -> bool:
        """True if a part of the region `word` is large enough by itself; of a face, the skin."""
        names = ("skin",) if word == "face" else REGION_LABELS[word]
        return any(self.on_face(name).any() for name in names)


def measure_appearance(image: Image, labels: LabelMap, face: Face) -> Appearance:
    """Returns the appearance of `face`.

    image: RGB uint8 (H, W, 3). labels: (H, W), CelebAMask-HQ classes, left and right as the
    viewer sees them. face: in pixels of the image.
    """
    parts, frame = _Parts(labels, face), frame_of(face)
    linear = to_linear(image)
    light = estimate_light(
        linear,
        inner(parts.on_face("skin", "nose")),
        {"eyes": parts.on_face(*REGION_LABELS["eyes"]), "teeth": parts.on_face("mouth")},
        np.isin(labels, (LABEL_IDS["background"], LABEL_IDS["cloth"])),
    )
    lab = lab_of(in_light(linear, light))
    mouth = _mouth(lab, light, parts, frame)
    ears = sum(bool(parts.on_face(name, share=MIN_EAR).any()) for name in REGION_LABELS["ears"])
    return Appearance(
        regions=frozenset(word for word in REGION_WORDS if parts.is_visible(word)),
        ears=ears,
        close_up=parts.height >= 0.5 * labels.shape[0],
        **_pose(frame, mouth),
        **_eyes(lab, parts, frame),
        **_hair(lab, light, parts, frame),
        **_worn(lab, light, parts, frame),
        **mouth,
    )


def _pose(frame: Frame, mouth: dict[str, Any]) -> dict[str, Any]:
    across, down = frame.nose
    turned = sum(abs(across) >= limit for limit in TURNED)
    # A smile or an open mouth moves the mouth's landmarks, and in a turned face the nose's position
    # between eyes and mouth says little about pitch.
    closed = mouth.get("mouth") in ("closed", "slightly open")
    pitch_unknown = turned >= 2 or mouth.get("smile") or not closed
    return {
        "turned": int(np.sign(across)) * turned,
        "tilted": int(np.sign(frame.roll)) if TILTED <= abs(frame.roll) < 60 else 0,
        "pitched": 0 if pitch_unknown else int(down < PITCHED[0]) - int(down > PITCHED[1]),
    }


def _eyes(lab: LabImage, parts: _Parts, frame: Frame) -> dict[str, Any]:
    eyes = [mask for name in REGION_LABELS["eyes"] if (mask := parts.on_face(name)).any()]
    brows, skin = parts.on_face("left_brow", "right_brow"), parts.on_face("skin")
    dark = False
    if brows.any() and skin.any():
        brow, face = float(np.median(lab[brows][:, 0])), float(np.median(lab[skin][:, 0]))
        dark = brow <= 46 and face - brow >= 20
    openness = [
        mask.sum() / (frame.size * max(np.ptp(frame.coordinates(mask)[0]), 1e-6)) ** 2
        for mask in eyes
    ]
    return {
        "eyes": len(eyes),
        "narrowed": len(eyes) == 2 and max(openness) < NARROWED,
        "dark_brows": dark,
    }


def _hair(lab: LabImage, light: Light, parts: _Parts, frame: Frame) -> dict[str, Any]:
    hair = _on_head(parts.near("hair", sides=0.8, up=1.0, down=2.0, share=MIN_HAIR), frame)
    if not hair.any():
        return {}
    color = common_color(lab, hair, agreement=0.6, at_least=MIN_PIXELS)
    skin = parts.on_face("skin")
    if color and skin.any() and np.linalg.norm(np.median(lab[skin], axis=0) - color) < LIKE_SKIN:
        color = None  # cropped or thin hair: what is seen through it is the scalp
    across, down = frame.coordinates(hair)
    # The chin is about 0.75 face sizes below the mouth. Hair below it, beside the neck, is long.
    below = (down > 2.0) & (np.abs(across) < 2.2)
    # A fringe: hair over the middle of the forehead, down to the brows.
    forehead = (np.abs(across) < 0.45) & (down > -0.62) & (down < -0.22)
    area = 0.9 * 0.4 * frame.size**2
    return {
        "hair": True,
        "hair_color": hair_name(color, light),
        "hair_long": bool(below.sum() >= 0.15 * frame.size**2),
        "fringe": bool(forehead.sum() >= 0.5 * area),
    }


def _worn(lab: LabImage, light: Light, parts: _Parts, frame: Frame) -> dict[str, Any]:
    glasses = parts.near("glasses", sides=0.1, up=0.1, down=0.0, share=MIN_WORN)
    hat = parts.near("hat", sides=0.6, up=1.0, down=0.0, share=10 * MIN_WORN)
    heights = frame.coordinates(hat)[1]
    # a hat sits above the brows
    if hat.any() and (np.median(heights) > -0.3 or _may_be_bandage(lab, hat, parts, frame)):
        hat = np.zeros_like(hat)
    heights = frame.coordinates(hat)[1]
    hair = frame.coordinates(parts.near("hair", sides=0.6, up=1.0, down=0.0))[1]
    headwear = hat.any() and (
        (heights > 0.6).mean() > 0.1  # covers the sides of the face
        or (hair < np.median(heights)).mean() > 0.15  # leaves the crown free
    )
    earring = parts.near("earring", sides=0.3, up=0.0, down=0.3)
    sides = frame.coordinates(earring)[0] > 0
    left, right = (_subset(earring, sides == side) for side in (False, True))
    necklace = parts.near("necklace", sides=0.6, up=0.0, down=0.8, share=MIN_NECKLACE)
    cloth = _cloth(parts)
    colors = {
        name: common_color(lab, mask, agreement=0.6, at_least=200) if mask.any() else None
        for name, mask in (("hat", hat), ("cloth", cloth))
    }
    background = parts.labels == LABEL_IDS["background"]
    backdrop = common_color(lab, background, agreement=0.85, at_least=round(0.08 * parts.total))
    skin = parts.on_face("skin")
    shaded = (
        glasses.any()
        and skin.any()
        and np.median(lab[glasses][:, 0]) < 0.5 * np.median(lab[skin][:, 0])
    )
    return {
        "glasses": bool(glasses.any()),
        "dark_glasses": bool(shaded and not parts.is_visible("eyes")),
        "hat": bool(hat.any()),
        "headwear": bool(headwear),
        "hat_color": fabric_name(colors["hat"], light),
        "earrings": sum(
            _glints(lab, m, GLINT[1]) for m in (left, right) if m.sum() >= MIN_EARRING * m.size
        ),
        "necklace": _glints(lab, necklace, GLINT[2]),
        "cloth": bool(cloth.any()),
        "cloth_color": fabric_name(colors["cloth"], light),
        "backdrop": fabric_name(backdrop, light),
    }


def _may_be_bandage(lab: LabImage, hat: Mask, parts: _Parts, frame: Frame) -> bool:
    """True if the mask is cloth of a bandage's colour without a hat's shape. A white cap without a
    brim can't be told from a bandage.
    """
    skin = parts.on_face("skin")
    if not skin.any():
        return False
    (across, down), face = frame.coordinates(hat), frame.coordinates(skin)[0]
    if np.ptp(across) > HAT_SHAPE[0] * np.ptp(face) or down.min() < -HAT_SHAPE[1]:
        return False
    cloth, tint = np.median(lab[hat], axis=0), np.median(lab[skin], axis=0)[1:]
    towards_skin = np.clip(cloth[1:] @ tint / max(float(tint @ tint), 1e-6), 0, 1)
    off = np.hypot(*(cloth[1:] - towards_skin * tint))
    return bool(cloth[0] >= PALE[0] and off <= PALE[1])


def _cloth(parts: _Parts) -> Mask:
    """Returns the mask of the clothes; empty if the parser is unreliable below the face, where it
    finds skin and hats on half-body images.
    """
    cloth = parts.near("cloth", sides=1.5, up=0.0, down=3.0, share=10 * MIN_WORN)
    _, _, _, chin = parts.box
    names = ("skin", "nose", "mouth", "upper_lip", "lower_lip", "glasses", "hat")
    misread = parts.near(*names, sides=1.5, up=0.0, down=3.0)
    below_chin = misread[max(0, round(chin + 0.1 * parts.height)) :]
    return np.zeros_like(cloth) if below_chin.sum() > 0.25 * cloth.sum() else cloth


def _on_head(hair: Mask, frame: Frame) -> Mask:
    """Returns `hair` without components entirely below the nose, such as collars and fur."""
    count, components = cv2.connectedComponents(hair.astype(np.uint8))
    on_head = np.zeros_like(hair)
    for index in range(1, count):
        component = components == index
        if frame.coordinates(component)[1].min() < 0.5:
            on_head |= component
    return on_head


def _mouth(lab: LabImage, light: Light, parts: _Parts, frame: Frame) -> dict[str, Any]:
    interior, upper, lower = (parts.on_face(name) for name in ("mouth", "upper_lip", "lower_lip"))
    if not (upper.any() and lower.any()):
        return {}
    lips, mouth = upper | lower, upper | lower | interior
    share = interior.sum() / mouth.sum()
    lightness, redness = np.median(lab[lips], axis=0)[:2]
    inside, black_and_white = lab[interior], not light.is_colored
    white = black_and_white | (inside[:, 1] < REDNESS[0] * redness)
    teeth = bool(share >= 0.1 and ((inside[:, 0] > lightness + 6) & white).mean() > TEETH)
    pink = (inside[:, 0] > lightness - 8) & (inside[:, 1] > REDNESS[1] * redness)
    tongue = lower.sum() > TONGUE[1] * upper.sum() or (
        share >= 0.1 and not black_and_white and pink.mean() > TONGUE[0]
    )
    across, down = frame.coordinates(mouth)
    width = float(max(np.ptp(across), 1e-6))
    off_middle = np.abs(across - (across.min() + across.max()) / 2) / width
    lift = float(down[off_middle < 0.15].mean() - down[off_middle > 0.38].mean()) / width
    smiling = lift > SMILE / 2 and lift + (width - SMILE_WIDTH) / 4 > SMILE
    return {
        "mouth": ("closed", "slightly open", "open", "wide open")[
            sum(share >= limit for limit in MOUTH_OPEN)
        ],
        "teeth": teeth,
        # a wide open, dark mouth may be speaking or shouting
        "smile": bool(smiling and not tongue and (teeth or share < MOUTH_OPEN[1])),
    }


def _subset(mask: Mask, chosen: npt.NDArray[np.bool_]) -> Mask:
    """Returns the mask with only the `chosen` (N,) of its N pixels, in row-major order."""
    part = np.zeros_like(mask)
    part[mask] = chosen
    return part


def _glints(lab: LabImage, mask: Mask, spread: float) -> bool:
    """True if the mask shows metal or stones, by its highlights. The parser also labels ear lobes
    as earrings, and folds and collars as necklaces.
    """
    if mask.sum() < MIN_PIXELS:
        return False
    light = lab[mask][:, 0]
    return bool(light.max() >= GLINT[0] and np.subtract(*np.percentile(light, (95, 5))) >= spread)


def _span(low: float, high: float, limit: int) -> slice:
    return slice(max(0, int(np.floor(low))), min(limit, max(0, int(np.ceil(high)))))
