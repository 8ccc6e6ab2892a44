"""Portraits of a configuration: seeds, both phases, guidance, every scheduler, errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from configs.errors import ConfigError, PipelineError
from configs.portraits import InferConfig, RegionStrength
from infer.generate import apply_template, evaluations, generate
from infer.identity import Identity
from infer.load import load_pipeline
from infer.pipelines import ConsistentIDPipeline
from infer.portrait import portrait_seed
from infer.schedulers import known_schedulers, make_scheduler, merge_position
from tests.infer.helpers import small

Pixels = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def settings(adapter: Path) -> InferConfig:
    return small(adapter, prompts=("a",))


def images(
    pipe: ConsistentIDPipeline, person: Identity, settings: InferConfig, **changes: object
) -> list[Pixels]:
    changed = replace(settings, **changes)  # type: ignore[arg-type]
    return [portrait.pixels for portrait in generate(pipe, person, changed)]


def same(one: Sequence[Pixels], other: Sequence[Pixels]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a, b) for a, b in zip(one, other, strict=True)
    )


def test_an_image_depends_only_on_its_own_numbers(
    pipe: ConsistentIDPipeline, person: Identity, settings: InferConfig
) -> None:
    many = images(pipe, person, settings, prompts=("a man", "a woman"), num_images_per_prompt=2)
    few = images(pipe, person, settings, prompts=("a man", "a woman"), num_images_per_prompt=1)
    assert same(few, [many[0], many[2]])
    assert same(
        many, images(pipe, person, settings, prompts=("a man", "a woman"), num_images_per_prompt=2)
    )
    assert not np.array_equal(many[0], many[1])
    assert not same(few, images(pipe, person, settings, prompts=("a man", "a woman"), seed=6))


def test_images_of_a_batch_differ_by_rounding_only(
    pipe: ConsistentIDPipeline, person: Identity, settings: InferConfig
) -> None:
    three = replace(settings, num_images_per_prompt=3)
    for scheduler in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"):
        alone, together = (
            images(pipe, person, three, batch_size=size, scheduler=scheduler) for size in (1, 2)
        )
        for one, other in zip(alone, together, strict=True):
            assert np.abs(one.astype(int) - other.astype(int)).max() <= 2, scheduler


def test_seeds_of_different_images_differ() -> None:
    seeds = [portrait_seed(s, j, i) for s in (0, 1) for j in (0, 1) for i in (0, 1)]
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_regions_have_an_effect_in_the_second_phase_only(
    pipe: ConsistentIDPipeline, person: Identity, settings: InferConfig
) -> None:
    no_regions = RegionStrength(face=0, ears=0, eyes=0, nose=0, mouth=0)
    steps = settings.num_inference_steps
    first_phase = [
        images(pipe, person, settings, start_merge_step=steps, region_strength=r)
        for r in (no_regions, RegionStrength())
    ]
    assert same(*first_phase)
    second_phase = [
        images(pipe, person, settings, start_merge_step=0, region_strength=r)
        for r in (no_regions, RegionStrength())
    ]
    assert not same(*second_phase)
    assert same(first_phase[0], second_phase[0]), "without regions both phases are equal"
    no_nose = images(
        pipe, person, settings, start_merge_step=0, region_strength=RegionStrength(nose=0)
    )
    assert not same(no_nose, second_phase[0]) and not same(no_nose, second_phase[1])


def test_legacy_mode_has_one_more_step_in_the_first_phase(
    legacy_adapter: Path, distant: Path, settings: InferConfig
) -> None:
    legacy = load_pipeline(small(legacy_adapter))
    person = legacy.encode_identity(distant)
    no_regions = RegionStrength(face=0, ears=0, eyes=0, nose=0, mouth=0)
    late = [
        images(legacy, person, settings, start_merge_step=3, region_strength=r)
        for r in (no_regions, RegionStrength())
    ]
    assert same(*late), "steps 0 to 3 of 4 are the first phase"
    assert not same(images(legacy, person, settings, start_merge_step=2), late[1])


def test_the_identity_changes_the_image(
    pipe: ConsistentIDPipeline, person: Identity, settings: InferConfig, stranger: Identity
) -> None:
    assert not same(images(pipe, person, settings), images(pipe, stranger, settings))
    assert not same(images(pipe, person, settings), images(pipe, person, settings, id_scale=0.0))


def test_a_guidance_scale_of_one_ignores_the_negative_prompt(
    pipe: ConsistentIDPipeline, person: Identity, settings: InferConfig
) -> None:
    prompts = ("ugly", "beautiful")
    assert same(
        *(
            images(pipe, person, settings, guidance_scale=1.0, negative_prompt=text)
            for text in prompts
        )
    )
    assert not same(
        *(
            images(pipe, person, settings, guidance_scale=5.0, negative_prompt=text)
            for text in prompts
        )
    )


def test_braces_in_a_prompt_have_no_meaning_to_the_template(
    pipe: ConsistentIDPipeline, person: Identity, settings: InferConfig
) -> None:
    wrapped = replace(settings, prompt_template="photo of {prompt}, film")
    tokens, _ = pipe.prompt_text(person, apply_template("a {man}", wrapped))
    assert tokens.text.startswith("photo of a {man}, film")


def test_merged_lora_gives_the_same_images(
    adapter: Path, pipe: ConsistentIDPipeline, person: Identity, settings: InferConfig
) -> None:
    merged = load_pipeline(small(adapter, merge_lora=True))
    [one], [other] = images(pipe, person, settings), images(merged, person, settings)
    assert np.abs(one.astype(int) - other.astype(int)).max() <= 2


@pytest.mark.parametrize("size", [(96, 64), (64, 128), (72, 64)])
def test_sizes(
    pipe: ConsistentIDPipeline, person: Identity, settings: InferConfig, size: tuple[int, int]
) -> None:
    [image] = images(pipe, person, settings, height=size[0], width=size[1], num_inference_steps=2)
    assert image.shape == (*size, 3)
    assert image.dtype == np.uint8


def test_every_known_scheduler_makes_an_image(
    pipe: ConsistentIDPipeline, person: Identity, settings: InferConfig
) -> None:
    names = known_schedulers()
    assert {
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "LCMScheduler",
    } <= set(names)
    for name in names:
        steps: list[int] = []
        chosen = replace(settings, scheduler=name)
        [portrait] = generate(pipe, person, chosen, steps.append)
        assert portrait.pixels.std() > 1, f"{name} gave a uniform image"
        assert sum(steps) == evaluations(pipe, chosen), name


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_latents_are_never_clipped(
    pipe: ConsistentIDPipeline, person: Identity, settings: InferConfig, kind: type
) -> None:
    """These schedulers clip to ±1 where the base's configuration doesn't say that they must not."""
    assert kind().config.clip_sample and "clip_sample" not in pipe.scheduler.config
    assert not make_scheduler(kind.__name__, pipe.scheduler).config.clip_sample
    own = pipe.scheduler
    latents = []
    for scheduler in (kind.from_config(own.config), make_scheduler(kind.__name__, own)):
        pipe.scheduler = scheduler  # as users of diffusers set it
        generator = torch.Generator().manual_seed(1)
        arguments = {"num_inference_steps": 4, "height": 32, "width": 32, "output_type": "latent"}
        latents.append(pipe("a", identity=person, generator=generator, **arguments).images)
    pipe.scheduler = own
    assert torch.equal(*latents)


def test_options_of_the_scheduler(
    pipe: ConsistentIDPipeline, person: Identity, settings: InferConfig
) -> None:
    karras = ("use_karras_sigmas=true", "timestep_spacing=trailing")
    assert not same(
        images(pipe, person, settings), images(pipe, person, settings, scheduler_options=karras)
    )
    assert not pipe.scheduler.config.use_karras_sigmas, "the pipeline has its own scheduler again"
    with pytest.raises(ConfigError, match=r"no option 'use_karas_sigmas'.*use_karras_sigmas"):
        images(pipe, person, settings, scheduler_options=("use_karas_sigmas=1",))


def test_a_portrait_whose_latents_are_not_finite_is_left_out(
    adapter: Path, person: Identity, settings: InferConfig, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = load_pipeline(small(adapter))
    rows: list[int] = [2]

    def spoil(_: object, __: object, output: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        output[0][rows] = float("nan")
        return output

    pipe.unet.register_forward_hook(spoil)
    three = replace(settings, num_images_per_prompt=3, batch_size=3, guidance_scale=1.0)
    assert [portrait.image_index for portrait in generate(pipe, person, three)] == [0, 1]
    assert "the latents of images 2 are not finite" in caplog.text
    assert "portrait 2 of prompt 0 was not made" in caplog.text
    rows[:] = [0, 1, 2]
    with pytest.raises(PipelineError, match="the latents of all 3 images are not finite"):
        list(generate(pipe, person, three))


def test_a_batch_that_does_not_fit_into_memory_is_halved(
    adapter: Path, person: Identity, settings: InferConfig, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, limit = load_pipeline(small(adapter)), [2]

    def refuse(_: object, arguments: tuple[torch.Tensor, ...]) -> None:
        if len(arguments[0]) > limit[0]:
            torch.empty(1 << 60)  # more than any machine has

    pipe.unet.register_forward_pre_hook(refuse)
    three = replace(settings, num_images_per_prompt=3, batch_size=3, guidance_scale=1.0)
    assert [portrait.image_index for portrait in generate(pipe, person, three)] == [0, 1, 2]
    assert "the memory isn't enough for 3 portraits together; making 1" in caplog.text
    limit[0] = 0
    with pytest.raises(PipelineError, match="isn't enough for one portrait of 32×32"):
        list(generate(pipe, person, three))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("EulerScheduler", "EulerDiscreteScheduler"),
        ("DPMSolverMultistep", "DPMSolverMultistepScheduler"),
        ("qqq", "Known: .*DDIMScheduler"),
        ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler"),
    ],
)
def test_the_error_for_an_unknown_scheduler_names_close_ones(
    pipe: ConsistentIDPipeline,
    person: Identity,
    settings: InferConfig,
    name: str,
    hint: str,
) -> None:
    with pytest.raises(ConfigError, match=f"scheduler={name}.*{hint}"):
        next(generate(pipe, person, replace(settings, scheduler=name)))


def test_merge_position_with_schedulers_that_evaluate_twice() -> None:
    assert merge_position(30, 50, 50) == 30
    assert merge_position(30, 50, 99) == 59  # Heun: 99 evaluations for 50 steps
    assert merge_position(0, 50, 99) == 0


def test_a_configuration_for_another_model_is_refused(adapter: Path) -> None:
    for changes, message in (
        ({"spec": "sd15"}, "is of spec tiny"),
        ({"mode": "legacy"}, "is of mode corrected"),
    ):
        config = small(adapter)
        config = replace(config, model=replace(config.model, **changes))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=message):
            load_pipeline(config)


def test_the_error_names_what_is_missing(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter given"):
        load_pipeline(InferConfig())
    with pytest.raises(ConfigError, match="nothing there"):
        load_pipeline(small(tmp_path / "none"))
    alone = tmp_path / "run" / "final"
    alone.mkdir(parents=True)
    for name in ("adapter.safetensors", "adapter.json"):
        (alone / name).write_bytes((adapter / name).read_bytes())
    with pytest.raises(ConfigError, match=r"model\.base=FOLDER"):
        load_pipeline(small(alone))


@pytest.mark.parametrize(
    "changes",
    [
        {"start_merge_step": 5},
        {"num_inference_steps": 0},
        {"guidance_scale": 0.5},
        {"height": 60},
        {"batch_size": 0},
        {"prompt_template": "film"},
        {"photo": "a", "identity": "b"},
    ],
)
def test_impossible_settings_are_refused(adapter: Path, changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        small(adapter, **changes)
