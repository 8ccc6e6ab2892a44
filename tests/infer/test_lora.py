"""`lora` of a configuration, with the scheduler of the preset for few steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from configs.errors import WeightsError
from infer.components import load_lora
from infer.generate import generate
from infer.identity import Identity
from infer.load import load_pipeline
from infer.pipelines import ConsistentIDPipeline
from tests.infer.helpers import small, write_lora

pytestmark = pytest.mark.thorough


def test_a_lora_is_loaded_beside_the_adapter_or_merged(
    trained: Path, adapter: Path, pipe: ConsistentIDPipeline, person: Identity, tmp_path: Path
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
    [without] = generate(pipe, person, settings)
    [beside] = generate(load_pipeline(settings), person, settings)
    assert np.abs(without.pixels.astype(int) - beside.pixels).max() > 20
    assert beside.settings["lora"] == str(tmp_path)

    merged = load_pipeline(replace(settings, merge_lora=True))
    [portrait] = generate(merged, person, settings)
    assert np.abs(portrait.pixels.astype(int) - beside.pixels).max() <= 1
    weights = merged.unet.state_dict()
    assert not any(".lora_A" in name or ".base_layer" in name for name in weights)
    merged.unload_consistentid_adapter()
    weight = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    before = stock.unet.state_dict()[weight.replace(".weight", ".base_layer.weight")]
    assert not torch.equal(weights[weight], before), "the LoRA stays"


def test_a_lora_that_is_missing_or_of_another_kind_is_an_error(
    pipe: ConsistentIDPipeline, adapter: Path, tmp_path: Path
) -> None:
    for lora in (tmp_path / "none", adapter / "adapter.safetensors"):
        with pytest.raises(WeightsError, match=f"lora={lora} could not be loaded"):
            load_lora(pipe, str(lora), merge=True)
