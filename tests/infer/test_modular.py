"""The modular pipeline against the classic one, and the folder that it is loaded from."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ClassifierFreeGuidance, ControlNetModel
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from configs.errors import ConfigError, PipelineError
from infer.hub import app, write_folder
from infer.identity import Identity
from infer.modular import (
    ConsistentIDXLBlocks,
    encode_identity,
    load_consistentid_adapter,
    unload_consistentid_adapter,
)
from infer.pipelines import (
    ConsistentIDXLControlNetPipeline,
    ConsistentIDXLImg2ImgPipeline,
    ConsistentIDXLInpaintPipeline,
    ConsistentIDXLPipeline,
)
from tests.infer.helpers import TINY_XL

pytestmark = pytest.mark.thorough
SIZE = {"height": 32, "width": 32}
STEPS, GUIDANCE = 3, 2.0
SHARED = {"num_inference_steps": STEPS, "output_type": "latent"}


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classic(pipe: Any, prompt: Any = "a man", **changes: Any) -> Tensor:
    options = {"generator": seeded(), "guidance_scale": GUIDANCE, **SHARED, **changes}
    latents: Tensor = pipe(prompt, **options).images
    return latents


def modular(pipe: Any, prompt: Any = "a man", **changes: Any) -> Tensor:
    options = {"generator": seeded(), **SHARED, **changes}
    latents: Tensor = pipe(prompt=prompt, output="images", **options)
    return latents


def close(one: Tensor, other: Tensor) -> bool:
    """Whether latents differ by rounding only."""
    return one.shape == other.shape and float((one - other).abs().max() / one.std()) < 1e-4


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def set_scheduler(xl: Any, blocks: Any, name: str) -> None:
    xl.scheduler = getattr(diffusers, name).from_config(xl.scheduler.config)
    blocks.update_components(scheduler=xl.scheduler)


def install(xl: Any, blocks: Any, adapter: Path) -> None:
    """Puts an adapter into the UNet of both."""
    assert load_consistentid_adapter(blocks, adapter) is xl.consistentid


@pytest.fixture(scope="module")
def xl(tiny_xl: Path, xl_adapter: Path) -> ConsistentIDXLPipeline:
    pipe = quiet(ConsistentIDXLPipeline.from_pretrained(tiny_xl))
    pipe.load_consistentid_adapter(xl_adapter)
    return pipe  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def blocks(xl: ConsistentIDXLPipeline) -> Any:
    """The modular pipeline, over the parts of the classic one."""
    pipe = ConsistentIDXLBlocks().init_pipeline()
    parts = {name: part for name, part in xl.components.items() if name != "feature_extractor"}
    pipe.update_components(**parts, consistentid=xl.consistentid)
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=GUIDANCE))
    return pipe


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"]
)
def test_latents_equal_those_of_the_classic_pipeline_bit_for_bit(
    xl: ConsistentIDXLPipeline, blocks: Any, person: Identity, name: str
) -> None:
    set_scheduler(xl, blocks, name)
    every = []
    for start in (0, 2, 1.0):
        options = {**SIZE, "identity": person, "start_merge_step": start}
        latents = modular(blocks, **options)
        assert torch.equal(latents, classic(xl, **options)), start
        every.append(latents)
    assert len({float(each.sum()) for each in every}) == len(every)
    text_alone = ConsistentIDXLBlocks().get_workflow("text2image").init_pipeline()
    text_alone.update_components(
        **{name: blocks.components[name] for name in text_alone.components}
    )
    assert torch.equal(modular(text_alone, **SIZE, identity=person, start_merge_step=2), every[1])
    with pytest.raises(ConfigError, match="start_merge_step=4: expected"):
        modular(blocks, **SIZE, identity=person, start_merge_step=4)


def test_prompts_people_and_texts_are_those_of_the_classic_call(
    xl: ConsistentIDXLPipeline, blocks: Any, person: Identity, stranger: Identity, photo: Path
) -> None:
    set_scheduler(xl, blocks, "EulerDiscreteScheduler")
    rows = {"identity": [person, stranger], "num_images_per_prompt": 2, **SIZE}
    texts = {
        "negative_prompt": ["ugly", ""],
        "prompt_2": "a portrait",
        "face_caption": "a face with blue eyes and a nose",
        "clip_skip": 1,
    }
    prompts = ["a man", "a woman"]
    assert torch.equal(
        modular(blocks, prompts, **rows, **texts), classic(xl, prompts, **rows, **texts)
    )
    options = {"describe_moment": True, **SIZE}
    state = blocks(
        prompt="a man", input_id_images=str(photo), generator=seeded(), **options, **SHARED
    )
    expected = classic(xl, identity=person, **options)
    assert torch.equal(state.get("images"), expected)
    again = modular(blocks, identity=state.get("identity"), **options)
    assert torch.equal(again, expected)
    assert not torch.equal(modular(blocks, identity=encode_identity(blocks, photo), **SIZE), again)


def test_legacy_swaps_one_evaluation_later(
    xl: ConsistentIDXLPipeline,
    blocks: Any,
    xl_adapter: Path,
    xl_legacy_adapter: Path,
    person: Identity,
) -> None:
    legacy = replace(person, mode="legacy", spec=TINY_XL.name)
    install(xl, blocks, xl_legacy_adapter)
    for name in ("EulerDiscreteScheduler", "HeunDiscreteScheduler"):
        set_scheduler(xl, blocks, name)
        for start in (0, 2, STEPS):
            options = {**SIZE, "identity": legacy, "start_merge_step": start}
            assert torch.equal(modular(blocks, **options), classic(xl, **options)), (name, start)
    install(xl, blocks, xl_adapter)


def test_image_to_image_and_in_painting(
    xl: ConsistentIDXLPipeline, blocks: Any, person: Identity
) -> None:
    picture, mask = Image.new("RGB", (64, 64), "teal"), Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    noise = torch.randn(1, 4, 16, 16, generator=seeded())
    for name in ("DDIMScheduler", "HeunDiscreteScheduler"):
        set_scheduler(xl, blocks, name)
        # steps 2 and 3 of four run, of which the last is in the second phase
        options = {"identity": person, "image": picture, "strength": 0.5, "start_merge_step": 3}
        options["num_inference_steps"] = 4
        for kind, more in (
            (ConsistentIDXLImg2ImgPipeline, {}),
            # the noise is given, since diffusers draws it before or after that of the mask's image
            (ConsistentIDXLInpaintPipeline, {"mask_image": mask, "latents": noise}),
        ):
            pipe = quiet(kind.from_pipe(xl))
            latents = modular(blocks, **options, **more)
            assert torch.equal(latents, classic(pipe, **options, **more)), (name, kind)
            other = modular(blocks, **options | {"start_merge_step": 4}, **more)
            assert not torch.equal(latents, other), (name, kind)


def test_a_controlnet_sees_the_text_without_id_tokens(
    xl: ConsistentIDXLPipeline, blocks: Any, person: Identity
) -> None:
    set_scheduler(xl, blocks, "HeunDiscreteScheduler")
    with xl.adapter.removed():
        controlnet = ControlNetModel.from_unet(
            xl.unet, conditioning_embedding_out_channels=(16, 32, 96)
        )
    torch.nn.init.normal_(controlnet.controlnet_mid_block.weight, std=0.3, generator=seeded())
    pipe = quiet(ConsistentIDXLControlNetPipeline.from_pipe(xl, controlnet=controlnet))
    blocks.update_components(controlnet=controlnet)
    picture = Image.new("RGB", (32, 32), "teal")
    expected = classic(pipe, image=picture, identity=person, **SIZE)
    assert close(modular(blocks, control_image=picture, identity=person, **SIZE), expected)
    assert not close(modular(blocks, identity=person, **SIZE), expected)


def test_a_guider_that_changes_the_unet_gets_its_branches_one_by_one(
    xl: ConsistentIDXLPipeline, blocks: Any, person: Identity
) -> None:
    class Preparing(ClassifierFreeGuidance):  # type: ignore[misc]
        def prepare_models(self, denoiser: Any) -> None:
            super().prepare_models(denoiser)

    set_scheduler(xl, blocks, "EulerDiscreteScheduler")
    states: list[Tensor] = []
    hook = xl.unet.register_forward_pre_hook(
        lambda _module, _arguments, options: states.append(options["encoder_hidden_states"]),
        with_kwargs=True,
    )
    together = modular(blocks, identity=person, **SIZE)
    classic(xl, identity=person, **SIZE)
    for one, other in zip(states[:STEPS], states[STEPS:], strict=True):
        assert len(one) == 2 and torch.equal(one, other), "in the order of the classic pipeline"
    plain = blocks.guider
    blocks.update_components(guider=Preparing(guidance_scale=GUIDANCE))
    assert close(modular(blocks, identity=person, **SIZE), together)
    assert [len(each) for each in states[2 * STEPS :]] == [1] * 2 * STEPS
    hook.remove()
    blocks.update_components(guider=plain)


def test_latents_that_are_not_finite(
    blocks: Any, person: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=seeded())
    latents[1, 0, 0, 0] = float("nan")
    options = {"identity": person, "num_images_per_prompt": 2, **SIZE, **SHARED}
    state = blocks(prompt="a man", latents=latents, **options)
    assert state.get("failed_images") == (1,) and "images 1 are not finite" in caplog.text
    with pytest.raises(PipelineError, match="latents of all 2 images are not finite"):
        blocks(prompt="a man", latents=latents * float("nan"), **options)


def test_without_adapter_it_is_diffusers_own(
    xl: ConsistentIDXLPipeline, blocks: Any, person: Identity, xl_adapter: Path
) -> None:
    set_scheduler(xl, blocks, "EulerDiscreteScheduler")
    first = modular(blocks, identity=person, **SIZE)
    with pytest.raises(ConfigError, match="pass either input_id_images or identity"):
        modular(blocks, **SIZE)
    unload_consistentid_adapter(blocks)
    assert not any("processor" in name for name in blocks.unet.state_dict())
    stock = quiet(diffusers.StableDiffusionXLPipeline(**xl.components))
    assert torch.equal(modular(blocks, **SIZE), classic(stock, **SIZE))
    with pytest.raises(ConfigError, match="no ConsistentID adapter is loaded"):
        modular(blocks, identity=person, **SIZE)
    install(xl, blocks, xl_adapter)
    assert torch.equal(modular(blocks, identity=person, **SIZE), first)
    blocks.consistentid.set_scale(0)
    assert not close(modular(blocks, identity=person, **SIZE), first)
    blocks.consistentid.set_scale(1)
    with pytest.raises(ConfigError, match="call load_components first"):
        load_consistentid_adapter(ConsistentIDXLBlocks().init_pipeline(), xl_adapter)


def test_the_folder_loads_offline_in_a_new_process_as_its_readme_says(
    xl: ConsistentIDXLPipeline,
    blocks: Any,
    tiny_xl: Path,
    xl_adapter: Path,
    person: Identity,
    tmp_path: Path,
) -> None:
    folder = write_folder(tmp_path / "modular", str(tiny_xl))
    write_folder(folder, str(tiny_xl))  # again
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    saved = person.save(tmp_path / "identity.safetensors")
    for text, replacement in (
        ("torch.float16", "torch.float32"),
        ('"cuda"', '"cpu"'),
        ('"JackAILab/ConsistentID", weight_name="ConsistentID_SDXL-v1.bin"', repr(str(xl_adapter))),
        (
            'input_id_images="ada.jpg", output="images")[0]',
            "identity=Identity.load('identity.safetensors'), num_inference_steps=3, height=32, "
            "width=32, output_type='latent', generator=torch.Generator().manual_seed(1), "
            "output='images')",
        ),
        ('image.save("ada-reading.png")', "torch.save(image, 'latents.pt')"),
    ):
        assert text in code
        code = code.replace(text, replacement)
    offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "cache")}
    subprocess.run(
        [sys.executable, "-c", f"from infer.identity import Identity\n{code}"],
        cwd=saved.parent,
        env={**os.environ, "PYTHONPATH": str(Path.cwd()), **offline},
        check=True,
        timeout=300,
    )
    set_scheduler(xl, blocks, "EulerDiscreteScheduler")
    install(xl, blocks, xl_adapter)
    latents = torch.load(tmp_path / "latents.pt", weights_only=True)
    expected = classic(
        xl, "a woman reading", identity=person, start_merge_step=0.6, guidance_scale=7.5, **SIZE
    )
    assert torch.equal(latents, expected)


def test_an_ip_adapter_is_not_offered_since_it_would_replace_the_adapter() -> None:
    own = ConsistentIDXLBlocks()
    names = (*own.available_workflows, *own.input_names, *own.sub_blocks)
    assert "controlnet_inpainting" in names
    assert not {"ip_adapter_text2image", "ip_adapter_image", "ip_adapter"} & set(names)


def test_what_the_folder_holds_and_bad_arguments(
    tmp_path: Path, tiny_xl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "hub")
    index = json.loads((folder / "modular_model_index.json").read_text())
    parts = {name: value[2] for name, value in index.items() if isinstance(value, list)}
    assert {spec["pretrained_model_name_or_path"] for spec in parts.values()} == {
        "stabilityai/stable-diffusion-xl-base-1.0"
    }
    assert all(spec["subfolder"] == name for name, spec in parts.items()) and "unet" in parts
    (tmp_path / "notes.txt").write_text("mine")
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: write_folder(tmp_path), "is not empty and holds no modular pipeline"),
        (lambda: write_folder(tmp_path / "notes.txt"), "is a file"),
        (lambda: write_folder(tmp_path / "new", str(tmp_path)), "has no text_encoder, "),
        (lambda: write_folder(tmp_path / "new", "/nowhere"), "no such folder"),
    ]
    for call, message in refused:
        with pytest.raises(ConfigError, match=message):
            call()
    assert not (tmp_path / "new").exists()
    runner = CliRunner()
    result = runner.invoke(app, [str(folder), "--base", str(tiny_xl)])
    assert result.exit_code == 0 and str(tiny_xl) in (folder / "README.md").read_text()
    result = runner.invoke(app, [str(tmp_path)])
    assert result.exit_code == 2 and "error: " in result.output
    monkeypatch.setitem(sys.modules, "infer.modular", None)  # as where the package isn't installed
    with pytest.raises(ImportError, match="needs the package consistentid-pipeline"):
        exec((folder / "block.py").read_text(), {})
