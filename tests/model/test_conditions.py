from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from model.conditions import Conditions, DropRates, build_conditions, collate, drop_conditions
from model.pixels import training_pixels
from model.spec import SPECS
from model.tokens import empty_ids
from stages.record import Record
from stages.regions import LABEL_IDS, region_masks
from tests.model.portraits import drawn, png, record

TINY = SPECS["tiny"]


def noun(sample: Conditions, slot: int, tokenizer: Any) -> str:
    text: str = tokenizer.decode([int(sample.input_ids[sample.token_idx[slot]])])
    return text.strip()


def test_a_corrected_slot_holds_the_region_of_its_noun(tokenizer: Any) -> None:
    sample = build_conditions(record(1), tokenizer, TINY, "corrected", resolution=128)
    masks = region_masks(drawn(1)[1], "corrected")
    assert sample.token_valid.all()
    for slot, region in enumerate(sample.regions):
        assert noun(sample, slot, tokenizer) == region
        assert torch.equal(sample.region_masks[slot] > 0.5, torch.from_numpy(masks[region]))


def test_legacy_swaps_eye_and_ear(tokenizer: Any) -> None:
    sample = build_conditions(record(1), tokenizer, TINY, "legacy", resolution=128)
    assert sample.regions == ("Face", "Left_Eye", "Left_Ear", "Nose", "Upper_Lip")
    assert [noun(sample, slot, tokenizer) for slot in range(5)] == [
        "face",
        "ears",
        "eyes",
        "nose",
        "mouth",
    ]


@pytest.mark.parametrize("mode", ["legacy", "corrected"])
def test_a_prompt_changes_the_text_and_no_image(tokenizer: Any, mode: Any) -> None:
    one = build_conditions(record(2), tokenizer, TINY, mode, resolution=64)
    two = build_conditions(
        record(2), tokenizer, TINY, mode, resolution=64, prompt="A man in a forest"
    )
    assert "forest" in two.text and "forest" not in one.text
    assert one.regions == two.regions
    for name in ("region_pixels", "clip_pixels", "identity", "region_masks", "foreground"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


def test_the_same_record_gives_the_same_bytes(tokenizer: Any) -> None:
    one, two = (
        build_conditions(record(3), tokenizer, TINY, "corrected", resolution=64) for _ in range(2)
    )
    for name, value in tensors_of(one).items():
        assert torch.equal(value, getattr(two, name)), name


def tensors_of(sample: Conditions) -> dict[str, torch.Tensor]:
    values = {name: getattr(sample, name) for name in Conditions.__slots__}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def test_missing_regions_are_padded_with_zeros_after_normalisation(tokenizer: Any) -> None:
    sample = build_conditions(
        record(1, face_caption="A nose."), tokenizer, TINY, "corrected", resolution=64
    )
    assert sample.regions == ("nose",)
    assert sample.token_valid.tolist() == [True, False, False, False, False]
    assert sample.region_pixels[0].abs().sum() > 0
    assert not sample.region_pixels[1:].any() and not sample.region_masks[1:].any()
    assert {region for region, _ in sample.dropped} == {"face", "ears", "eyes", "mouth"}


def off_centre(seed: int) -> Record:
    """Returns a portrait at the left end of a wide image, where a centre crop loses it."""
    image, labels = drawn(seed)
    wide = np.pad(image, ((0, 0), (0, 256), (0, 0)))
    return replace(
        record(seed), image=png(wide), parsing=png(np.pad(labels, ((0, 0), (0, 256)))), width=384
    )


def test_corrected_region_images_of_a_wide_photograph_show_the_regions(tokenizer: Any) -> None:
    black = -torch.tensor([0.48145466, 0.4578275, 0.40821073]) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    legacy = build_conditions(off_centre(1), tokenizer, TINY, "legacy", resolution=64).region_pixels
    corrected = build_conditions(
        off_centre(1), tokenizer, TINY, "corrected", resolution=64
    ).region_pixels
    not_black = [
        (pixels - black.view(1, 3, 1, 1)).abs().amax(1).gt(0.05).flatten(1).any(1)
        for pixels in (legacy, corrected)
    ]
    assert not not_black[0].any()
    assert not_black[1].all()


def test_training_pixels_and_masks_have_the_same_crop(tokenizer: Any) -> None:
    labels = np.zeros((96, 160), np.uint8)
    labels[30:60, 70:90] = LABEL_IDS["nose"]
    image = np.where(labels[..., None] > 0, 255, 0).astype(np.uint8).repeat(3, axis=2)
    wide = replace(record(1), image=png(image), parsing=png(labels), width=160, height=96)
    sample = build_conditions(wide, tokenizer, TINY, "corrected", resolution=48)
    pixels = training_pixels(wide, 48)
    assert pixels.shape == (3, 48, 48) and pixels.min() == -1 and pixels.max() == 1
    nose = sample.region_masks[sample.regions.index("nose")]
    assert torch.equal(nose, (pixels[0] > 0).float())
    assert torch.equal(sample.foreground, nose)


def test_the_error_names_what_an_incomplete_record_lacks(tokenizer: Any) -> None:
    bare = replace(record(1), parsing=b"", identity=None)
    with pytest.raises(ValueError, match="no parsing, identity"):
        build_conditions(bare, tokenizer, TINY, "corrected", resolution=64)


@pytest.fixture(scope="module")
def batch(tokenizer: Any) -> Any:
    return collate(
        [
            build_conditions(record(seed), tokenizer, TINY, "corrected", resolution=32)
            for seed in range(4)
        ]
    )


def test_the_draw_decides_whether_text_identity_or_both_are_dropped(
    batch: Any, tokenizer: Any
) -> None:
    rates = DropRates(text=0.1, identity=0.1, both=0.1)
    dropped = drop_conditions(batch, torch.tensor([0.05, 0.15, 0.25, 0.5]), rates, tokenizer)
    empty = empty_ids(tokenizer)
    assert [torch.equal(row, empty) for row in dropped.input_ids] == [True, False, True, False]
    assert dropped.identity.any(1).tolist() == [True, False, False, True]
    assert dropped.clip_pixels.flatten(1).any(1).tolist() == [True, False, False, True]
    assert dropped.token_valid.any(1).tolist() == [False, False, False, True]
    assert torch.equal(dropped.token_mask.sum(1), dropped.token_valid.sum(1))
    assert batch.identity.any(1).all(), "the argument must not change"


def test_legacy_dropping_preserves_the_identity_embedding(batch: Any, tokenizer: Any) -> None:
    rates = DropRates(text=0, identity=0, both=0.1, legacy=True)
    dropped = drop_conditions(batch, torch.tensor([0.05, 0.15, 0.25, 0.5]), rates, tokenizer)
    assert dropped.identity.any(1).all()
    assert dropped.clip_pixels.flatten(1).any(1).tolist() == [False, True, True, True]


def test_impossible_rates_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 1"):
        DropRates(text=0.6, identity=0.6)


def test_the_second_encoders_ids_are_padded_with_zero_after_eos(tokenizer: Any) -> None:
    sample = build_conditions(record(1), tokenizer, TINY, "corrected", resolution=32)
    end = sample.input_ids.tolist().index(tokenizer.eos_token_id)
    assert torch.equal(sample.input_ids[: end + 1], sample.input_ids_2[: end + 1])
    assert not sample.input_ids_2[end + 1 :].any()
