"""Defines the labels of a label map, the facial regions they form, and the regions' masks.

`legacy` masks equal the reference's (`functions.py`): outer contours are filled, so a mask has no
holes (the face's mask includes eyes, nose and mouth), and of each pair only the first part is used.
`corrected` masks are the labels themselves; both eyes, both ears and the whole mouth are one region
each. Depends on numpy and OpenCV only.
"""

from __future__ import annotations

from typing import Final, Literal

import cv2
import numpy as np
import numpy.typing as npt

Mode = Literal["legacy", "corrected"]
LabelMap = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

LABELS: Final = (
    "background",
    "skin",
    "left_brow",
    "right_brow",
    "left_eye",
    "right_eye",
    "glasses",
    "left_ear",
    "right_ear",
    "earring",
    "nose",
    "mouth",
    "upper_lip",
    "lower_lip",
    "neck",
    "necklace",
    "cloth",
    "hair",
    "hat",
)
LABEL_IDS: Final = {name: label for label, name in enumerate(LABELS)}

REGION_WORDS: Final = ("face", "ears", "eyes", "nose", "mouth")
MAX_REGIONS: Final = len(REGION_WORDS)

# The face is all that is inside its outline; hair, ears and neck are not part of it.
REGION_LABELS: Final[dict[str, tuple[str, ...]]] = {
    "face": (
        "skin",
        "left_brow",
        "right_brow",
        "left_eye",
        "right_eye",
        "glasses",
        "nose",
        "mouth",
        "upper_lip",
        "lower_lip",
    ),
    "ears": ("left_ear", "right_ear"),
    "eyes": ("left_eye", "right_eye"),
    "nose": ("nose",),
    "mouth": ("mouth", "upper_lip", "lower_lip"),
}

# The reference's region names → labels, in the order in which the reference passes regions to the
# model.
LEGACY_REGIONS: Final[dict[str, str]] = {
    "Face": "skin",
    "Left_Eye": "left_eye",
    "Right_Eye": "right_eye",
    "Left_Ear": "left_ear",
    "Right_Ear": "right_ear",
    "Nose": "nose",
    "Upper_Lip": "upper_lip",
    "Lower_Lip": "lower_lip",
}
_LEGACY_WORDS: Final = {
    "Face": "face",
    "Ear": "ears",
    "Eye": "eyes",
    "Nose": "nose",
    "Lip": "mouth",
}


def word_of(region: str) -> str:
    """Returns the word of REGION_WORDS for a region of either mode: "eyes" for "Left_Eye" and
    "eyes".

    Raises ValueError for a name that neither mode has.
    """
    if region in REGION_WORDS:
        return region
    if region not in LEGACY_REGIONS:
        raise ValueError(
            f"unknown region {region!r}; known: {', '.join((*REGION_WORDS, *LEGACY_REGIONS))}"
        )
    return _LEGACY_WORDS[region.rsplit("_", 1)[-1]]


def region_masks(label_map: LabelMap, mode: Mode) -> dict[str, Mask]:
    """Returns region name → mask (H, W), for the at most five regions in a label map (H, W) uint8.

    legacy: Face, one eye, one ear, Nose, one lip, in this order, under the reference's names.
    corrected: named and ordered as in REGION_WORDS. Regions without pixels are left out. Raises
    ValueError if it isn't a label map.
    """
    _check(label_map)
    if mode == "legacy":
        return _first_of_each_pair(filled_masks(label_map))
    masks = {
        word: np.isin(label_map, [LABEL_IDS[label] for label in labels])
        for word, labels in REGION_LABELS.items()
    }
    return {word: masks[word] for word in REGION_WORDS if masks[word].any()}


def filled_masks(label_map: LabelMap) -> dict[str, Mask]:
    """Returns the reference's region name → mask (H, W) with filled contours, for all parts that
    are present, both parts of a pair too.
    """
    present = {label: label_map == LABEL_IDS[label] for label in LEGACY_REGIONS.values()}
    return {
        name: _fill(present[label])
        for name, label in LEGACY_REGIONS.items()
        if present[label].any()
    }


def foreground_mask(label_map: LabelMap, mode: Mode) -> Mask:
    """Returns (H, W), True on the person.

    legacy: the reference's `WithoutBackground`, the inverse of the background with filled contours:
    False everywhere if the background surrounds the person. corrected: all labels except
    background.
    """
    return ~background_mask(label_map, mode)


def background_mask(label_map: LabelMap, mode: Mode) -> Mask:
    """Returns (H, W), True on the background; legacy: contours filled, see `foreground_mask`."""
    _check(label_map)
    background: Mask = label_map == LABEL_IDS["background"]
    return _fill(background) if mode == "legacy" else background


def _check(label_map: LabelMap) -> None:
    if label_map.ndim != 2 or label_map.dtype != np.uint8:
        raise ValueError(
            f"a label map is (H, W) of uint8, not {label_map.shape} of {label_map.dtype}"
        )


def _fill(mask: Mask) -> Mask:
    """Returns the mask with its outer contours filled."""
    contours, _ = cv2.findContours(
        mask.astype(np.uint8) * 255, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
    )
    canvas = np.zeros(mask.shape, np.uint8)
    cv2.drawContours(canvas, contours, -1, 255, thickness=cv2.FILLED)
    return canvas > 0


def _first_of_each_pair(masks: dict[str, Mask]) -> dict[str, Mask]:
    chosen: dict[str, Mask] = {}
    words: set[str] = set()
    for name, mask in masks.items():
        if word_of(name) not in words:
            words.add(word_of(name))
            chosen[name] = mask
    return chosen
