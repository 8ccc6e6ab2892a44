"""The pipelines against a denoising loop of the test's own; adapters, people, texts."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image
from torch import Tensor

from configs.errors import ConfigError, WeightsError
from infer.identity import Identity
from infer.pipelines import ConsistentIDPipeline
from infer.request import guidance_of
from infer.schedulers import merge_position
from model.consistentid import predict_noise
from tests.infer.helpers import CALL, STEPS, close, run, seeded

SCHEDULERS = [
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
]


@torch.no_grad()
def denoised(pipe: Any, person: Identity, prompt: str, merge: int) -> Tensor:
    """Denoises in a loop that is written out. merge: evaluations of the UNet in the first phase."""
    guidance = guidance_of(pipe, pipe.adapter, [person], {"prompt": prompt})
    scheduler, generator = pipe.scheduler, seeded()
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(1, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    options = pipe.prepare_extra_step_kwargs(generator, 0.0)
    for step, timestep in enumerate(scheduler.timesteps):
        states = guidance.early if step < merge else guidance.late
        both = scheduler.scale_model_input(torch.cat((latents, latents)), timestep)
        noise, _ = predict_noise(pipe.unet, both, timestep, torch.cat((guidance.negative, states)))
        negative, positive = noise.chunk(2)
        noise = negative + 2.0 * (positive - negative)
        latents = scheduler.step(noise, timestep, latents, **options).prev_sample
    return latents


@pytest.mark.parametrize("name", SCHEDULERS)
def test_latents_equal_those_of_a_loop_bit_for_bit(
    own: ConsistentIDPipeline, person: Identity, name: str
) -> None:
    base = own.scheduler.config
    own.scheduler = getattr(diffusers, name).from_config(base, clip_sample=False)
    own.scheduler.set_timesteps(STEPS)
    evaluations = len(own.scheduler.timesteps)
    for start, step in ((0, 0), (4, 4), (0.5, 3)):
        expected = denoised(own, person, "a man", merge_position(step, STEPS, evaluations))
        assert torch.equal(run(own, person, start_merge_step=start), expected), start
    assert not torch.equal(run(own, person, start_merge_step=1.0), expected)


def test_prompts_people_and_seeds_in_one_call(
    pipe: ConsistentIDPipeline, person: Identity, stranger: Identity
) -> None:
    rows = [("a man", person, 1), ("a woman", stranger, 2), ("a man", stranger, 3)]
    together = run(
        pipe,
        [who for _, who, _ in rows],  # type: ignore[arg-type]
        [prompt for prompt, _, _ in rows],
        generator=[seeded(seed) for _, _, seed in rows],
        negative_prompt=["ugly", "", "ugly"],
    )
    negatives = ("ugly", "", "ugly")
    for row, negative, (prompt, who, seed) in zip(together, negatives, rows, strict=True):
        alone = run(pipe, who, prompt, generator=seeded(seed), negative_prompt=negative)
        assert close(row[None], alone), (prompt, seed)
    copies = run(pipe, person, generator=[seeded(5), seeded(1)], num_images_per_prompt=2)
    assert close(copies[1:], run(pipe, person))
    with pytest.raises(ConfigError, match="2 people for 3 prompts"):
        run(pipe, [person, stranger], ["a", "b", "c"])  # type: ignore[arg-type]


def test_a_photograph_and_its_identity_give_the_same(
    pipe: ConsistentIDPipeline, person: Identity, photo: Path
) -> None:
    with Image.open(photo) as image:
        image.load()
    # the phrases of a description depend on the file's name, which an image has none of
    described = {"face_caption": "a face with eyes, a nose and a mouth"}
    expected = run(pipe, person, **described)
    for shown in (photo, [str(photo)], photo.read_bytes()):
        latents = run(pipe, None, input_id_images=shown, **described)  # type: ignore[arg-type]
        assert torch.equal(latents, expected)
    for shown in (image, np.asarray(image)):  # decoded by Pillow, so a pixel may differ by one
        assert float(pipe.encode_identity(shown).embedding @ person.embedding) > 0.99
    turned = run(pipe, None, input_id_images=image.rotate(5), **described)  # type: ignore[arg-type]
    assert not torch.equal(turned, expected)


def test_text_is_encoded_once_and_people_are_projected_once(
    own: ConsistentIDPipeline, person: Identity, photo: Path
) -> None:
    calls: list[str] = []
    modules = {
        "text": own.text_encoder,
        "image": own.image_encoder,
        "projector": own.adapter.model.image_proj_model,
        "regions": own.adapter.model.FacialEncoder.visual_projection,
    }
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    assert own.encode_identity(photo) is own.encode_identity(str(photo))
    assert calls == ["image"], "the photograph is read once"
    calls.clear()
    run(own, person, ["a man", "a woman"], generator=None)
    assert sorted(calls) == ["projector", "regions", *["text"] * 3], "two prompts, a negative one"
    run(own, person, ["a man", "a woman"], generator=None)
    assert len(calls) == 5, "everything is cached"
    with torch.no_grad():
        next(own.text_encoder.parameters()).mul_(1.5)
    run(own, person, "a man")
    assert calls.count("text") == 5, "the encoder's weights changed"


def test_loading_and_unloading_leaves_the_base_bit_for_bit(
    bare: ConsistentIDPipeline, adapter: Path, legacy_adapter: Path, person: Identity
) -> None:
    pipe = bare
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    processors = dict(pipe.unet.attn_processors)
    plain = pipe("a man", generator=seeded(), **CALL).images
    pipe.load_consistentid_adapter(adapter)
    first = run(pipe, person)
    pipe.fuse_consistentid()
    assert close(run(pipe, person), first) and not torch.equal(run(pipe, person), first)
    pipe.load_consistentid_adapter(legacy_adapter)  # the merged one is removed before
    pipe.load_consistentid_adapter(adapter)
    assert torch.equal(run(pipe, person), first)
    pipe.fuse_consistentid()
    pipe.unfuse_consistentid()
    assert torch.equal(run(pipe, person), first)
    pipe.unload_consistentid_adapter()
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert pipe.unet.attn_processors == processors
    assert torch.equal(pipe("a man", generator=seeded(), **CALL).images, plain)
    with pytest.raises(ConfigError, match="no ConsistentID adapter is loaded"):
        run(pipe, person)


def test_scales(own: ConsistentIDPipeline, person: Identity) -> None:
    first = run(own, person)
    results = [first]
    for scale in (0.5, {"eyes": 1.2, "mouth": 0}, {"identity": 0}):
        own.set_consistentid_scale(scale)
        results.append(run(own, person))
    assert len({float(each.sum()) for each in results}) == 4
    own.set_consistentid_scale({"identity": 1, "eyes": 1, "mouth": 1})
    assert torch.equal(run(own, person), first)
    for wrong in ({"chin": 1}, -1, {"eyes": float("nan")}):
        with pytest.raises(ConfigError, match="scale of"):
            own.set_consistentid_scale(wrong)


def test_saving_and_loading_gives_the_same_pipeline(
    own: ConsistentIDPipeline, person: Identity, tmp_path: Path
) -> None:
    first = run(own, person)
    own.fuse_consistentid()
    own.save_pretrained(tmp_path)
    assert close(run(own, person), first)
    again = ConsistentIDPipeline.from_pretrained(tmp_path, dtype="auto")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(run(again, person), first)
    assert again.adapter.reader.config == own.adapter.reader.config
    stock = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert not any("processor" in name for name in stock.unet.state_dict())


def test_the_callers_callback_and_embeddings_are_respected(
    pipe: ConsistentIDPipeline, person: Identity
) -> None:
    steps: list[int] = []

    def callback(
        _pipe: Any, step: int, _time: Any, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        steps.append(step)
        assert set(tensors) == {"latents"}
        return {"latents": tensors["latents"] * (2.0 if step == STEPS - 1 else 1.0)}

    doubled = run(pipe, person, callback_on_step_end=callback)
    assert steps == list(range(STEPS)) and torch.equal(doubled, 2 * run(pipe, person))
    for cutoff in (0.3, 0.8):  # before and after the second phase begins
        cut = SDCFGCutoffCallback(cutoff_step_ratio=cutoff)
        assert run(pipe, person, callback_on_step_end=cut).isfinite().all()
    embeddings = pipe.encode_prompt("a man", "cpu", 1, True)
    own = run(
        pipe,
        person,
        None,
        prompt_embeds=embeddings[0],
        negative_prompt_embeds=embeddings[1],
    )
    assert close(own, run(pipe, person, face_caption="a person", start_merge_step=1.0)) is False
    assert torch.equal(
        own, run(pipe, person, None, prompt_embeds=embeddings[0], negative_prompt="")
    )


def test_an_incomplete_base_is_refused(trained: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for part in (trained / "base").iterdir():
        (tmp_path / part.name).symlink_to(part)
    for name, file in (
        ("text_encoder", "model.safetensors"),
        ("unet", "diffusion_pytorch_model.safetensors"),
    ):
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        for part in (trained / "base" / name).iterdir():
            (tmp_path / name / part.name).symlink_to(part)
        weights = load_file(tmp_path / name / file)
        lost = sorted(weights)[3]
        del weights[lost]
        (tmp_path / name / file).unlink()
        save_file(weights, tmp_path / name / file, metadata={"format": "pt"})
        with pytest.raises(WeightsError, match=rf"{name} lacks 1 weights .* the first is {lost}"):
            ConsistentIDPipeline.from_pretrained(tmp_path)
        (tmp_path / name / file).unlink()
        (tmp_path / name / file).symlink_to(trained / "base" / name / file)


def test_half_precision_on_a_cpu_is_warned_of(
    own: ConsistentIDPipeline, person: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    own.to(torch.bfloat16)
    assert run(own, person).dtype == torch.bfloat16
    assert "emulated" not in caplog.text
    own.to(torch.float16)
    run(own, person, num_inference_steps=1)
    assert "float16 on a CPU is emulated" in caplog.text


def test_the_description_of_the_face_and_what_is_said_of_it(
    own: ConsistentIDPipeline, person: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    caption = "A face with brown eyes, a nose and a mouth that is open in a smile."
    smiling = dataclasses.replace(
        person, record=dataclasses.replace(person.record, face_caption=caption)
    )
    texts = {
        "default": own.prompt_text(smiling, "a man")[0].text,
        "moment": own.prompt_text(smiling, "a man", describe_moment=True)[0].text,
        "own": own.prompt_text(smiling, "a man", "a face with a scar")[0].text,
    }
    assert "brown" in texts["default"] and "smile" not in texts["default"]
    assert "smile" in texts["moment"] and "scar" in texts["own"] and "brown" not in texts["own"]
    latents = [
        run(own, smiling, describe_moment=moment, start_merge_step=0) for moment in (False, True)
    ]
    assert not torch.equal(*latents)
    for _ in range(2):
        run(own, smiling, "a man with blue eyes in " + "a very large forest, " * 30)
    assert caplog.text.count("The prompt is too long for the 77 tokens") == 1
    assert caplog.text.count("since the prompt says 'blue eyes'") == 1


def test_one_of_several_faces_is_chosen_by_its_number(
    pipe: ConsistentIDPipeline,
    person: Identity,
    stranger: Identity,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    images = [
        Image.open(io.BytesIO(each.record.image)).resize((512, 512)) for each in (person, stranger)
    ]
    both = Image.new("RGB", (1024, 512))
    for number, image in enumerate(images):
        both.paste(image, (512 * number, 0))
    both.save(tmp_path / "both.png")
    left, right = (pipe.encode_identity(tmp_path / "both.png", face=n) for n in (1, 2))
    assert "The photograph shows 2 faces" in caplog.text
    for face, expected, other in ((left, person, stranger), (right, stranger, person)):
        assert face.embedding @ expected.embedding > 0.8 > face.embedding @ other.embedding
    with pytest.raises(ConfigError, match="face=3: the photograph shows 2 faces"):
        pipe.encode_identity(tmp_path / "both.png", face=3)
