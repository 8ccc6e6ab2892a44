"""`lora` of a configuration, with the scheduler of the preset for few steps."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from configs.errors import WeightsError
from infer.generate import generate
from infer.identity import Identity
from infer.load import load_pipeline
from tests.infer.helpers import small
from tests.infer.test_pipelines import write_lora


def test_a_lora_is_loaded_beside_the_adapter_or_merged(
    trained: Path, adapter: Path, person: Identity, tmp_path: Path
) -> None:
    stock = diffusers.StableDiffusionPipeline.from_pretrained(trained / "base")
    write_lora(stock, tmp_path)
    settings = small(
        adapter,
        lora=str(tmp_path),
        prompts=("a",),
        scheduler="LCMScheduler",
        guidance_scale=1.0,
        start_merge_step=0.5,
    )
    plain = load_pipeline(small(adapter))
    [without] = generate(plain, person, settings)
    plain.load_lora_weights(tmp_path)  # type: ignore[attr-defined]
    [expected] = generate(plain, person, settings)
    assert not np.array_equal(without.pixels, expected.pixels)

    [beside] = generate(load_pipeline(settings), person, settings)
    assert np.array_equal(beside.pixels, expected.pixels)
    assert beside.settings["lora"] == str(tmp_path)

    merged = load_pipeline(small(adapter, lora=str(tmp_path), merge_lora=True))
    [portrait] = generate(merged, person, settings)
    assert np.abs(portrait.pixels.astype(int) - expected.pixels).max() <= 1
    assert not any(".lora_A" in name or ".base_layer" in name for name in merged.unet.state_dict())
    merged.unload_consistentid_adapter()
    weight = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    before = stock.unet.state_dict()[weight.replace(".weight", ".base_layer.weight")]
    assert not torch.equal(merged.unet.state_dict()[weight], before), "the LoRA stays"


def test_a_lora_that_is_missing_or_of_another_kind_is_an_error(
    adapter: Path, tmp_path: Path
) -> None:
    for lora in (tmp_path / "none", adapter / "adapter.safetensors"):
        with pytest.raises(WeightsError, match=f"lora={lora} could not be loaded"):
            load_pipeline(small(adapter, lora=str(lora)))
