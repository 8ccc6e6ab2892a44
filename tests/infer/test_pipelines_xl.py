"""SDXL's pipelines: against a denoising loop of the test's own, and SDXL's own arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor

from infer.identity import Identity, encode_photo
from infer.pipelines import (
    ConsistentIDXLControlNetPipeline,
    ConsistentIDXLImg2ImgPipeline,
    ConsistentIDXLInpaintPipeline,
    ConsistentIDXLPipeline,
)
from infer.request import FaceText, guidance_of
from infer.schedulers import merge_position
from model.consistentid import predict_noise
from tests.infer.helpers import CALL, SIZE, STEPS, close, contexts, run, seeded

pytestmark = pytest.mark.thorough
PICTURE = Image.new("RGB", (32, 32), "teal")
WITHOUT_SIZE = {name: value for name, value in CALL.items() if name not in SIZE}


@pytest.fixture(scope="module")
def xl(tiny_xl: Path, xl_adapter: Path) -> ConsistentIDXLPipeline:
    """A pipeline whose scheduler the tests may set, and which they leave otherwise as it is."""
    return load(tiny_xl, xl_adapter)


@pytest.fixture(scope="module")
def legacy(tiny_xl: Path, xl_legacy_adapter: Path) -> ConsistentIDXLPipeline:
    return load(tiny_xl, xl_legacy_adapter)


@pytest.fixture(scope="module")
def legacy_person(legacy: ConsistentIDXLPipeline, person: Identity) -> Identity:
    model = legacy.adapter.model
    return encode_photo(
        person.record, legacy.image_encoder, model.spec, model.mode, person.embedder
    )


def load(base: Path, adapter: Path) -> ConsistentIDXLPipeline:
    pipe = ConsistentIDXLPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_consistentid_adapter(adapter)
    return pipe


@torch.no_grad()
def denoised(pipe: Any, person: Identity, merge: int, **texts: str) -> Tensor:
    """Denoises in a loop that is written out. merge: evaluations of the UNet in the first phase."""
    guidance = guidance_of(pipe, pipe.adapter, [person], {"prompt": "a man", **texts}, FaceText())
    scheduler, generator = pipe.scheduler, seeded()
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(1, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    options = pipe.prepare_extra_step_kwargs(generator, 0.0)
    sizes = torch.tensor([(32.0, 32.0, 0.0, 0.0, 32.0, 32.0)] * 2)
    for step, timestep in enumerate(scheduler.timesteps):
        first = step < merge
        states = guidance.early if first else guidance.late
        pooled = guidance.pooled_early if first else guidance.pooled_late
        assert pooled is not None and guidance.pooled_negative is not None
        noise, _ = predict_noise(
            pipe.unet,
            scheduler.scale_model_input(torch.cat((latents, latents)), timestep),
            timestep,
            torch.cat((guidance.negative, states)),
            pooled=torch.cat((guidance.pooled_negative, pooled)),
            time_ids=sizes,
        )
        negative, positive = noise.chunk(2)
        noise = negative + 2.0 * (positive - negative)
        latents = scheduler.step(noise, timestep, latents, **options).prev_sample
    return latents


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_latents_equal_those_of_a_loop_bit_for_bit(
    xl: ConsistentIDXLPipeline,
    legacy: ConsistentIDXLPipeline,
    person: Identity,
    legacy_person: Identity,
    name: str,
) -> None:
    for pipe, who, more in ((xl, person, 0), (legacy, legacy_person, 1)):
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        results = []
        for start, step in ((0, 0), (0.5, 3)):
            results.append(run(pipe, who, start_merge_step=start))
            evaluations = len(pipe.scheduler.timesteps)
            merge = merge_position(step, STEPS, evaluations) + more
            assert torch.equal(results[-1], denoised(pipe, who, merge)), (start, more)
        assert not torch.equal(*results)


def test_the_second_prompts_reach_the_second_encoder(
    xl: ConsistentIDXLPipeline,
    legacy: ConsistentIDXLPipeline,
    person: Identity,
    legacy_person: Identity,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for pipe, who in ((xl, person), (legacy, legacy_person)):
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        for merge in (0, 1.0):  # all steps of the second phase, all of the first
            call = {"start_merge_step": merge, "num_inference_steps": 1}
            first = run(pipe, who, **call)
            assert torch.equal(first, run(pipe, who, **call, prompt_2="a man"))
            for change in ("prompt_2", "negative_prompt", "negative_prompt_2"):
                other = run(pipe, who, **call, **{change: "a red coat"})
                assert not close(first, other), (change, merge, pipe.adapter.model.mode)
    assert "prompt_2 has another number of tokens than prompt" in caplog.text


def test_rows_copies_guidance_and_sizes(
    xl: ConsistentIDXLPipeline, person: Identity, stranger: Identity
) -> None:
    first = run(xl, person)
    copies = run(xl, person, generator=[seeded(5), seeded(1)], num_images_per_prompt=2)
    assert close(copies[1:], first)
    rows: dict[str, Any] = {
        "prompt": ["a man", "a woman"],
        "prompt_2": ["tall", "old"],
        "negative_prompt": ["ugly", "blurry"],
        "generator": [seeded(1), seeded(2)],
    }
    together = run(xl, [person, stranger], **rows)  # type: ignore[arg-type]
    row = {name: values[1] for name, values in rows.items() if name != "generator"}
    assert close(together[1:], run(xl, stranger, **row, generator=seeded(2)))
    states, stop = contexts(xl)
    unguided = run(xl, person, guidance_scale=1.0)
    stop()
    assert {len(each) for each in states} == {1} and not close(unguided, first)
    sizes = {"original_size": (512, 512), "crops_coords_top_left": (3, 4)}
    assert not close(run(xl, person, **sizes), first)


def test_the_callers_embeddings_get_the_id_tokens(
    xl: ConsistentIDXLPipeline, person: Identity
) -> None:
    states, negative, pooled, pooled_negative = xl.encode_prompt(
        "a man", device=torch.device("cpu"), negative_prompt=""
    )
    positive = {"prompt_embeds": states, "pooled_prompt_embeds": pooled}
    negatives = {
        "negative_prompt_embeds": negative,
        "negative_pooled_prompt_embeds": pooled_negative,
    }
    own = run(xl, person, None, **positive, **negatives)
    assert run(xl, person, None, **positive).shape == own.shape
    xl.set_consistentid_scale(0)
    assert not close(own, run(xl, person, None, **positive, **negatives))
    xl.set_consistentid_scale(1)


@pytest.mark.parametrize("options", [{}, {"use_karras_sigmas": True}])
@pytest.mark.parametrize("split", [0.5, 0.8])
def test_a_split_schedule_gives_what_the_whole_one_gives(
    xl: ConsistentIDXLPipeline, person: Identity, options: dict[str, bool], split: float
) -> None:
    """The second pipeline begins in the middle of the schedule, whose timesteps needn't be evenly
    spaced; the second phase begins at the same one.
    """
    spacing = {"use_karras_sigmas": False} | options
    xl.scheduler = diffusers.EulerDiscreteScheduler.from_config(xl.scheduler.config, **spacing)
    refine = ConsistentIDXLImg2ImgPipeline.from_pipe(xl, requires_aesthetics_score=False)
    refine.set_progress_bar_config(disable=True)
    sizes = {"original_size": (32, 32), "target_size": (32, 32)}
    for merge in (0.0, 0.5, 0.6, 0.9):
        whole = run(xl, person, start_merge_step=merge)
        half = run(xl, person, start_merge_step=merge, denoising_end=split)
        call = WITHOUT_SIZE | sizes | {"start_merge_step": merge, "denoising_start": split}
        rest = refine("a man", image=half, identity=person, **call).images
        assert close(rest, whole), merge


def test_img2img_in_painting_and_controlnet(xl: ConsistentIDXLPipeline, person: Identity) -> None:
    xl.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        xl.scheduler.config, use_karras_sigmas=False
    )
    picture = ConsistentIDXLImg2ImgPipeline.from_pipe(xl)
    picture.set_progress_bar_config(disable=True)
    states, stop = contexts(picture)
    call = WITHOUT_SIZE | {"num_inference_steps": 10, "start_merge_step": 8}
    picture("a man", image=PICTURE, strength=0.5, identity=person, generator=seeded(), **call)
    stop()
    assert [not torch.equal(each, states[0]) for each in states] == [False] * 3 + [True] * 2

    noise = torch.randn(1, 4, 8, 8, generator=seeded())
    first = run(xl, person, latents=noise)
    paint = ConsistentIDXLInpaintPipeline.from_pipe(xl)
    paint.set_progress_bar_config(disable=True)
    white = Image.new("L", (32, 32), 255)
    options = {"image": PICTURE, "mask_image": white, "strength": 1.0, "latents": noise}
    assert close(run(paint, person, **options), first)

    with xl.adapter.removed():
        net = diffusers.ControlNetModel.from_unet(
            xl.unet, conditioning_embedding_out_channels=(16, 32, 96)
        )
    for nets, images in ((net, PICTURE), ([net, net], [PICTURE, PICTURE])):
        control = ConsistentIDXLControlNetPipeline.from_pipe(xl, controlnet=nets)
        control.set_progress_bar_config(disable=True)
        scale = [1.0, 1.0] if isinstance(nets, list) else 1.0
        options = {"image": images, "controlnet_conditioning_scale": scale, "latents": noise}
        assert torch.equal(run(control, person, **options), first), "its output is zero"
    with torch.no_grad():
        net.controlnet_mid_block.weight.normal_(std=0.3)
    assert not close(run(control, person, **options), first)


def test_a_saved_pipeline_loads_as_any_of_diffusers_classes(
    xl: ConsistentIDXLPipeline, person: Identity, tmp_path: Path
) -> None:
    first = run(xl, person)
    xl.save_pretrained(tmp_path)
    again = ConsistentIDXLPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(run(again, person), first)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
