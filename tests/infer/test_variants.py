"""Image to image, in-painting, ControlNet, LoRA and the VAE's options with an adapter."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

from infer.identity import Identity
from infer.pipelines import (
    ConsistentIDControlNetPipeline,
    ConsistentIDImg2ImgPipeline,
    ConsistentIDInpaintPipeline,
    ConsistentIDPipeline,
)
from tests.infer.helpers import CALL, SIZE, close, contexts, run, seeded, write_lora


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_image_to_image_begins_the_second_phase_at_the_same_noise(
    own: ConsistentIDPipeline, person: Identity, strength: float
) -> None:
    pipe = ConsistentIDImg2ImgPipeline.from_pipe(own)
    pipe.set_progress_bar_config(disable=True)
    states, stop = contexts(pipe)
    call = {name: value for name, value in CALL.items() if name not in SIZE}
    picture = Image.new("RGB", (32, 32), "teal")
    options = {"generator": seeded(), "num_inference_steps": 10, "start_merge_step": 8}
    pipe("a man", image=picture, strength=strength, identity=person, **(call | options))
    stop()
    late = [not torch.equal(each, states[0]) for each in states]
    steps = round(10 * strength)
    assert len(states) == steps and sum(late) == 2, "steps 8 and 9 of ten"


def test_in_painting_all_of_a_picture_is_making_one(
    own: ConsistentIDPipeline, person: Identity
) -> None:
    pipe = ConsistentIDInpaintPipeline.from_pipe(own)
    pipe.set_progress_bar_config(disable=True)
    picture, white = Image.new("RGB", (32, 32), "teal"), Image.new("L", (32, 32), 255)
    options = {"image": picture, "latents": torch.randn(1, 4, 8, 8, generator=seeded())}
    whole = run(pipe, person, mask_image=white, strength=1.0, **options)
    assert close(whole, run(own, person, latents=options["latents"]))
    half = white.copy()
    half.paste(0, (0, 0, 16, 32))
    part = run(pipe, person, mask_image=half, strength=1.0, **options)
    assert part.shape == whole.shape and not close(part[..., :4], whole[..., :4])


def test_a_controlnet_sees_the_text_without_id_tokens(
    own: ConsistentIDPipeline, person: Identity
) -> None:
    with own.adapter.removed():
        controlnet = diffusers.ControlNetModel.from_unet(
            own.unet, conditioning_embedding_out_channels=(16, 32, 96)
        )
    pipe = ConsistentIDControlNetPipeline.from_pipe(own, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    lengths: list[int] = []
    controlnet.mid_block.register_forward_pre_hook(
        lambda _module, _arguments, options: lengths.append(
            options["encoder_hidden_states"].shape[1]
        ),
        with_kwargs=True,
    )
    picture = Image.new("RGB", (32, 32), "teal")
    assert torch.equal(run(pipe, person, image=picture), run(own, person)), "its output is zero"
    assert set(lengths) == {77}
    with torch.no_grad():
        controlnet.controlnet_mid_block.weight.normal_(std=0.3)
    assert not close(run(pipe, person, image=picture), run(own, person))


def test_a_lora_beside_the_adapter_in_either_order(
    trained: Path, adapter: Path, person: Identity, tmp_path: Path
) -> None:
    lora = tmp_path / "lora"
    stock = diffusers.StableDiffusionPipeline.from_pretrained(trained / "base")
    write_lora(stock, lora)
    results = []
    for lora_first in (True, False):
        pipe = ConsistentIDPipeline.from_pretrained(trained / "base")
        pipe.set_progress_bar_config(disable=True)
        if lora_first:
            pipe.load_lora_weights(lora)
        pipe.load_consistentid_adapter(adapter)
        without = run(pipe, person)
        if not lora_first:
            pipe.load_lora_weights(lora)
        results.append(run(pipe, person))
        pipe.fuse_consistentid()
        assert close(run(pipe, person), results[-1])
        pipe.unfuse_consistentid()
        assert torch.equal(run(pipe, person), results[-1])
        weak = run(pipe, person, cross_attention_kwargs={"scale": 0.0})
        pipe.unload_lora_weights()
        assert close(weak, run(pipe, person)) and not close(results[-1], weak)
        if not lora_first:
            assert torch.equal(run(pipe, person), without)
    assert torch.equal(*results)


def test_slicing_and_tiling_of_the_vae(own: ConsistentIDPipeline, person: Identity) -> None:
    options = {"output_type": "np", "num_images_per_prompt": 2, "height": 64, "width": 64}
    whole = run(own, person, **options)
    own.vae.enable_slicing()
    assert abs(run(own, person, **options) - whole).max() < 1e-5
    own.vae.enable_tiling()
    own.vae.tile_sample_min_size, own.vae.tile_latent_min_size = 32, 8
    tiled = run(own, person, **options)
    assert tiled.shape == whole.shape and 0 < abs(tiled - whole).mean() < 0.2
