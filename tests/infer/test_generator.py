"""Generation: cached features, seeds, both phases, guidance, every scheduler, errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from configs.errors import ConfigError
from configs.portraits import InferConfig, RegionStrength
from infer.generator import ConsistentIDGenerator
from infer.identity import Identity
from infer.load import load_generator
from infer.portrait import portrait_seed
from infer.schedulers import known_schedulers, merge_position
from model.conditions import collate
from model.consistentid import encode_frozen
from tests.infer.helpers import small

Pixels = npt.NDArray[np.uint8]


def images(
    generator: ConsistentIDGenerator,
    person: Identity,
    prompts: str | Sequence[str] = "a",
    **changes: object,
) -> list[Pixels]:
    settings = replace(generator.config, **changes)  # type: ignore[arg-type]
    return [portrait.pixels for portrait in generator.generate(person, prompts, settings)]


def same(one: Sequence[Pixels], other: Sequence[Pixels]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a, b) for a, b in zip(one, other, strict=True)
    )


def test_features_from_an_identity_equal_those_encoded_anew(
    generator: ConsistentIDGenerator, person: Identity
) -> None:
    conditions = generator.conditions(person, "a person in a garden")
    expected = encode_frozen(generator.base, collate([conditions]))
    features = generator._features(person, conditions)
    for name in (
        "text_hidden",
        "clip_hidden",
        "region_hidden",
        "identity",
        "token_mask",
        "token_valid",
    ):
        torch.testing.assert_close(
            getattr(features, name), getattr(expected, name), atol=1e-5, rtol=1e-5
        )


def test_a_person_is_encoded_in_one_call_and_a_prompt_in_one(
    adapter: Path, photo: Path, person: Identity
) -> None:
    generator = load_generator(small(adapter))
    calls: list[str] = []

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda *_: calls.append(name))

    watch("image", generator.base.image_encoder)
    watch("text", generator.base.text_encoder)
    list(
        generator.generate(
            person, ["a", "b", "c"], replace(generator.config, num_images_per_prompt=2)
        )
    )
    assert calls.count("image") == 0, "the identity has the image encoder's states"
    assert calls.count("text") == 4, "three prompts, and the negative prompt once"
    generator.encode(person.record)
    assert calls.count("image") == 1, "the photograph and its regions in one call"


def test_an_image_depends_only_on_its_own_numbers(
    generator: ConsistentIDGenerator, person: Identity
) -> None:
    many = images(generator, person, ["a man", "a woman"], num_images_per_prompt=2)
    few = images(generator, person, ["a man", "a woman"], num_images_per_prompt=1)
    assert same(few, [many[0], many[2]])
    assert same(many, images(generator, person, ["a man", "a woman"], num_images_per_prompt=2))
    assert not np.array_equal(many[0], many[1])
    assert not same(few, images(generator, person, ["a man", "a woman"], seed=6))


def test_images_of_a_batch_differ_by_rounding_only(
    generator: ConsistentIDGenerator, person: Identity
) -> None:
    for scheduler in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"):
        alone, together = (
            images(generator, person, batch_size=size, num_images_per_prompt=3, scheduler=scheduler)
            for size in (1, 2)
        )
        for one, other in zip(alone, together, strict=True):
            assert np.abs(one.astype(int) - other.astype(int)).max() <= 2, scheduler


def test_seeds_of_different_images_and_purposes_differ() -> None:
    seeds = [
        portrait_seed(s, j, i, p)
        for s in (0, 1)
        for j in (0, 1)
        for i in (0, 1)
        for p in ("latents", "steps")
    ]
    assert len(set(seeds)) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_regions_have_an_effect_in_the_second_phase_only(
    generator: ConsistentIDGenerator, person: Identity
) -> None:
    no_regions = RegionStrength(face=0, ears=0, eyes=0, nose=0, mouth=0)
    steps = generator.config.num_inference_steps
    first_phase = [
        images(generator, person, start_merge_step=steps, region_strength=r)
        for r in (no_regions, RegionStrength())
    ]
    assert same(*first_phase)
    second_phase = [
        images(generator, person, start_merge_step=0, region_strength=r)
        for r in (no_regions, RegionStrength())
    ]
    assert not same(*second_phase)
    assert same(first_phase[0], second_phase[0]), "without regions both phases are equal"
    no_nose = images(generator, person, start_merge_step=0, region_strength=RegionStrength(nose=0))
    assert not same(no_nose, second_phase[0]) and not same(no_nose, second_phase[1])


def test_legacy_mode_has_one_more_step_in_the_first_phase(
    legacy_adapter: Path, photo: Path
) -> None:
    legacy = load_generator(small(legacy_adapter))
    person = legacy.identity(photo)
    no_regions = RegionStrength(face=0, ears=0, eyes=0, nose=0, mouth=0)
    late = [
        images(legacy, person, start_merge_step=3, region_strength=r)
        for r in (no_regions, RegionStrength())
    ]
    assert same(*late), "steps 0 to 3 of 4 are the first phase"
    assert not same(images(legacy, person, start_merge_step=2), late[1])


def test_the_identity_changes_the_image(
    generator: ConsistentIDGenerator, person: Identity, stranger: Identity
) -> None:
    assert not same(images(generator, person), images(generator, stranger))
    assert not same(images(generator, person), images(generator, person, id_scale=0.0))


def test_a_guidance_scale_of_one_ignores_the_negative_prompt(
    generator: ConsistentIDGenerator, person: Identity
) -> None:
    prompts = ("ugly", "beautiful")
    assert same(
        *(images(generator, person, guidance_scale=1.0, negative_prompt=text) for text in prompts)
    )
    assert not same(
        *(images(generator, person, guidance_scale=5.0, negative_prompt=text) for text in prompts)
    )


def test_braces_in_a_prompt_have_no_meaning_to_the_template(
    generator: ConsistentIDGenerator, person: Identity
) -> None:
    settings = replace(generator.config, prompt_template="photo of {prompt}, film")
    assert generator.conditions(person, "a {man}", settings).text.startswith(
        "photo of a {man}, film"
    )


def test_merged_lora_gives_the_same_images(
    adapter: Path, generator: ConsistentIDGenerator, person: Identity
) -> None:
    merged = load_generator(small(adapter, merge_lora=True))
    [one], [other] = images(generator, person), images(merged, person)
    assert np.abs(one.astype(int) - other.astype(int)).max() <= 2


@pytest.mark.parametrize("size", [(96, 64), (64, 128), (72, 64)])
def test_sizes(generator: ConsistentIDGenerator, person: Identity, size: tuple[int, int]) -> None:
    [image] = images(generator, person, height=size[0], width=size[1], num_inference_steps=2)
    assert image.shape == (*size, 3)
    assert image.dtype == np.uint8


def test_every_known_scheduler_makes_an_image(
    generator: ConsistentIDGenerator, person: Identity
) -> None:
    names = known_schedulers()
    assert {
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "LCMScheduler",
    } <= set(names)
    for name in names:
        evaluations: list[int] = []
        settings = replace(generator.config, scheduler=name)
        [portrait] = generator.generate(person, "a", settings, evaluations.append)
        assert portrait.pixels.std() > 1, f"{name} gave a uniform image"
        assert sum(evaluations) == generator.evaluations(settings), name


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
    generator: ConsistentIDGenerator, person: Identity, name: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=f"scheduler={name}.*{hint}"):
        next(generator.generate(person, "a", replace(generator.config, scheduler=name)))


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
            load_generator(config)


def test_the_error_names_what_is_missing(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter given"):
        load_generator(InferConfig())
    with pytest.raises(ConfigError, match="nothing there"):
        load_generator(small(tmp_path / "none"))
    alone = tmp_path / "run" / "final"
    alone.mkdir(parents=True)
    for name in ("adapter.safetensors", "adapter.json"):
        (alone / name).write_bytes((adapter / name).read_bytes())
    with pytest.raises(ConfigError, match=r"model\.base=FOLDER"):
        load_generator(small(alone))


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
