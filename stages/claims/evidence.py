"""Compares claims with the label map, the appearance and the measured pose.

A claim is contradicted only where the measurement leaves no doubt; all limits are defined here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from stages.annotations import Measures
from stages.backends.appearance import MIN_PIXELS, Appearance, frame_of
from stages.claims.grammar import Claim
from stages.codec import LabelMap
from stages.record import Face
from stages.regions import LABEL_IDS, REGION_LABELS, Mask

# Degrees of yaw: a face turned by less to a side may be turned to the other one; over the second,
# none is seen from the front; under the third, none is in profile; over the last, nobody looks to
# the other side.
_STRAIGHT: Final = 4.0
_NOT_FRONTAL: Final = 30.0
_NO_PROFILE: Final = 20.0
_GAZE: Final = 15.0
_PITCHED: Final = 6.0  # degrees of pitch, from which a head isn't moved in the other direction
_MUCH_HAIR: Final = 0.03  # share of the image, from which nobody is bald
_NO_SMILE: Final = 0.04  # lift of the mouth's corners, in its widths, below which nobody smiles
# claimed hair colour → natural ones that, measured, don't contradict it
_ALIKE: Final = {
    "black": ("black", "dark", "dark brown", "brown", "grey"),
    "brown": (
        "black",
        "dark",
        "dark brown",
        "brown",
        "light brown",
        "light",
        "auburn",
        "red",
        "blond",
    ),
    "blond": ("blond", "light brown", "light", "white", "grey", "auburn"),
    "grey": ("grey", "white", "dark", "black", "blond", "light"),
    "red": ("red", "auburn", "brown", "light brown", "dark brown"),
}
_NATURAL: Final = frozenset(color for colors in _ALIKE.values() for color in colors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What was measured of a sample's main face. yaw, pitch: degrees, as in Measures. lift: of the
    mouth's corners, in widths of the mouth; None: the lips aren't visible.
    """

    appearance: Appearance
    labels: LabelMap
    yaw: float
    pitch: float
    lift: float | None

    def pixels(self, *names: str) -> int:
        """Returns the number of pixels with these labels."""
        return int(np.isin(self.labels, [LABEL_IDS[name] for name in names]).sum())


def evidence_of(
    appearance: Appearance, labels: LabelMap, face: Face, measures: Measures
) -> Evidence:
    """appearance: of this face. labels: (H, W), CelebAMask-HQ classes. face: in their pixels."""
    return Evidence(
        appearance=appearance,
        labels=labels,
        yaw=measures.yaw,
        pitch=measures.pitch,
        lift=_lift(np.isin(labels, [LABEL_IDS[n] for n in REGION_LABELS["mouth"]]), face),
    )


def _lift(mouth: Mask, face: Face) -> float | None:
    """Returns how much higher the corners of a mouth are than its middle, in its widths."""
    if mouth.sum() < MIN_PIXELS:
        return None
    across, down = frame_of(face).coordinates(mouth)
    width = float(max(np.ptp(across), 1e-6))
    off_middle = np.abs(across - (across.min() + across.max()) / 2) / width
    middle, corners = off_middle < 0.15, off_middle > 0.38
    if not (middle.any() and corners.any()):
        return None
    return float(down[middle].mean() - down[corners].mean()) / width


def contradicts(claim: Claim, evidence: Evidence) -> bool:
    """True if the measurements leave no doubt that a claim is false."""
    return _TESTS[claim.topic](claim.value, evidence)


def _glasses(value: str, evidence: Evidence) -> bool:
    if value == "no":
        return evidence.appearance.glasses
    return evidence.appearance.eyes > 0 and evidence.pixels("glasses") < MIN_PIXELS


def _hat(value: str, evidence: Evidence) -> bool:
    if value == "no":
        return evidence.appearance.hat
    return evidence.appearance.hair and evidence.pixels("hat") < MIN_PIXELS


def _bald(value: str, evidence: Evidence) -> bool:
    share = evidence.pixels("hair") / evidence.labels.size
    return evidence.appearance.hair and share >= _MUCH_HAIR


def _hair_color(value: str, evidence: Evidence) -> bool:
    if not evidence.appearance.hair:
        return evidence.pixels("hair", "hat") < MIN_PIXELS
    measured = evidence.appearance.hair_color
    return measured in _NATURAL and measured not in _ALIKE[value]


def _mouth(value: str, evidence: Evidence) -> bool:
    measured = evidence.appearance.mouth
    return measured in (("closed",) if value == "open" else ("open", "wide open"))


def _teeth(value: str, evidence: Evidence) -> bool:
    if value == "no":
        return evidence.appearance.teeth
    return evidence.appearance.mouth == "closed"


def _smile(value: str, evidence: Evidence) -> bool:
    if value == "no":
        return evidence.appearance.smile
    lift = evidence.lift
    return not evidence.appearance.smile and lift is not None and lift < _NO_SMILE


def _ears(value: str, evidence: Evidence) -> bool:
    shown = sum(evidence.pixels(name) >= MIN_PIXELS for name in REGION_LABELS["ears"])
    if value == "hidden":
        return evidence.appearance.ears == 2
    if value == "one":
        return evidence.appearance.ears == 2 or not shown
    return shown < (2 if value == "both" else 1)


def _turned(value: str, evidence: Evidence) -> bool:
    yaw = evidence.yaw
    if value == "front":
        return abs(yaw) > _NOT_FRONTAL
    if value == "profile":
        return abs(yaw) < _NO_PROFILE
    return (yaw if value == "left" else -yaw) > _STRAIGHT


def _gaze(value: str, evidence: Evidence) -> bool:
    if value in ("left", "right"):
        return (evidence.yaw if value == "left" else -evidence.yaw) > _GAZE
    return (evidence.pitch if value == "down" else -evidence.pitch) > 2 * _PITCHED


def _pitched(value: str, evidence: Evidence) -> bool:
    return (evidence.pitch if value == "down" else -evidence.pitch) > _PITCHED


_TESTS: Final = {
    "glasses": _glasses,
    "hat": _hat,
    "bald": _bald,
    "hair_color": _hair_color,
    "mouth": _mouth,
    "teeth": _teeth,
    "smile": _smile,
    "ears": _ears,
    "turned": _turned,
    "gaze": _gaze,
    "pitched": _pitched,
}
