"""Labels, facial regions and their masks, in legacy and corrected mode."""

from __future__ import annotations

import numpy as np
import pytest

from stages.regions import (
    LABEL_IDS,
    LABELS,
    LEGACY_REGIONS,
    REGION_WORDS,
    background_mask,
    filled_masks,
    foreground_mask,
    region_masks,
    word_of,
)
from tests.model.portraits import drawn


def labels_with(**rectangles: tuple[int, int, int, int]) -> np.ndarray:
    """A 40 × 40 label map; a rectangle is (top, bottom, left, right)."""
    labels = np.zeros((40, 40), np.uint8)
    for name, (top, bottom, left, right) in rectangles.items():
        labels[top:bottom, left:right] = LABEL_IDS[name]
    return labels


def test_label_ids_are_those_of_celebamask_hq() -> None:
    assert len(LABELS) == 19
    names = ("skin", "glasses", "mouth", "hair", "hat")
    assert [LABEL_IDS[name] for name in names] == [1, 6, 11, 17, 18]


def test_the_face_mask_includes_the_eyes_in_both_modes() -> None:
    labels = labels_with(skin=(5, 35, 5, 35), left_eye=(10, 14, 10, 14))
    assert (labels[10:14, 10:14] != LABEL_IDS["skin"]).all()
    assert region_masks(labels, "legacy")["Face"][10:14, 10:14].all()
    corrected = region_masks(labels, "corrected")
    assert corrected["face"][5:35, 5:35].all()
    assert corrected["eyes"].sum() == 16


def test_legacy_uses_the_first_of_a_pair_and_corrected_both() -> None:
    _, labels = drawn(1)
    legacy = list(region_masks(labels, "legacy"))
    assert legacy == ["Face", "Left_Eye", "Left_Ear", "Nose", "Upper_Lip"]
    corrected = region_masks(labels, "corrected")
    assert tuple(corrected) == REGION_WORDS
    for word, parts in (("eyes", ("left_eye", "right_eye")), ("ears", ("left_ear", "right_ear"))):
        for part in parts:
            assert corrected[word][labels == LABEL_IDS[part]].all(), part
    labels[labels == LABEL_IDS["left_eye"]] = LABEL_IDS["skin"]
    assert "Right_Eye" in region_masks(labels, "legacy")


def test_the_mouth_includes_both_lips_and_its_interior() -> None:
    labels = labels_with(
        upper_lip=(10, 12, 5, 20), mouth=(12, 15, 5, 20), lower_lip=(15, 18, 5, 20)
    )
    assert region_masks(labels, "corrected")["mouth"].sum() == 8 * 15


def test_absent_regions_are_left_out() -> None:
    labels = labels_with(nose=(5, 9, 5, 9))
    assert list(region_masks(labels, "legacy")) == ["Nose"]
    assert set(region_masks(labels, "corrected")) == {"face", "nose"}
    assert region_masks(np.zeros((8, 8), np.uint8), "corrected") == {}
    assert filled_masks(np.zeros((8, 8), np.uint8)) == {}


def test_a_legacy_background_that_surrounds_the_person_includes_the_person() -> None:
    labels = labels_with(skin=(10, 30, 10, 30))
    assert background_mask(labels, "legacy").all()
    assert foreground_mask(labels, "corrected").sum() == 400
    labels[:, :5] = LABEL_IDS["hair"]
    labels[30:, :] = LABEL_IDS["cloth"]
    assert foreground_mask(labels, "legacy")[:, 0].all()


def test_every_region_has_a_word() -> None:
    assert {word_of(region) for region in LEGACY_REGIONS} == set(REGION_WORDS)
    assert [word_of(word) for word in REGION_WORDS] == list(REGION_WORDS)
    with pytest.raises(ValueError, match="Left_Brow"):
        word_of("Left_Brow")


def test_an_array_that_is_not_a_label_map_is_an_error() -> None:
    with pytest.raises(ValueError, match="uint8"):
        region_masks(np.zeros((4, 4), np.int64), "corrected")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="uint8"):
        background_mask(np.zeros((4, 4, 3), np.uint8), "legacy")
