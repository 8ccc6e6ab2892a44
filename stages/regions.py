"""Labels, facial regions and region masks: the one place that says which labels make an eye, an ear
or a mouth.

`legacy` masks repeat the reference (`functions.py`): outer contours filled, so that a mask has no
holes (the face's covers eyes, nose and mouth), and of every pair only the first part. `corrected`
masks are the labels themselves, with both eyes, both ears and the whole mouth as one region each.
Needs numpy and OpenCV only.
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

# The face is everything inside its outline, as a drawing of it would be; hair, ears and neck are
# not.
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

# The reference's names in label order, which is also the order in which it hands regions to the
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
    """The word of REGION_WORDS that names a region of either mode: "Left_Eye" and "eyes" both give
    "eyes".

    Raises ValueError for a name of neither mode.
    """
    if region in REGION_WORDS:
        return region
    if region not in LEGACY_REGIONS:
        raise ValueError(
            f"unknown region {region!r}; known: {', '.join((*REGION_WORDS, *LEGACY_REGIONS))}"
        )
    return _LEGACY_WORDS[region.rsplit("_", 1)[-1]]


def region_masks(label_map: LabelMap, mode: Mode) -> dict[str, Mask]:
    """The masks (H, W) of the regions that a label map (H, W, uint8) shows, at most five.

    legacy: Face, one eye, one ear, Nose, one lip, in this order and under the reference's names.
    corrected: under the words of REGION_WORDS and in their order. A region without a pixel is left
    out.
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
    """Every part that the reference knows, both of a pair too, with filled outlines; absent parts
    are left out.
    """
    present = {label: label_map == LABEL_IDS[label] for label in LEGACY_REGIONS.values()}
    return {
        name: _fill(present[label])
        for name, label in LEGACY_REGIONS.items()
        if present[label].any()
    }


def foreground_mask(label_map: LabelMap, mode: Mode) -> Mask:
    """True on the person (H, W).

    legacy: the reference's `WithoutBackground`, the inverse of the *filled* background; where the
    background runs round the whole person this is False everywhere. corrected: every label but the
    background.
    """
    return ~background_mask(label_map, mode)


def background_mask(label_map: LabelMap, mode: Mode) -> Mask:
    """True on the background (H, W); filled in legacy mode, see `foreground_mask`."""
    _check(label_map)
    background: Mask = label_map == LABEL_IDS["background"]
    return _fill(background) if mode == "legacy" else background


def _check(label_map: LabelMap) -> None:
    if label_map.ndim != 2 or label_map.dtype != np.uint8:
        raise ValueError(
            f"a label map is (H, W) of uint8, not {label_map.shape} of {label_map.dtype}"
        )


def _fill(mask: Mask) -> Mask:
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
