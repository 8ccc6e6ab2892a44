"""Pictures to measure: with an adapter, by the base alone, and rows of calibration."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from configs.portraits import InferConfig
from infer.evaluation.calibration import calibration
from infer.evaluation.denoising import adapted_model
from infer.evaluation.faces import FaceMeasurer, MeasuredPicture
from infer.evaluation.people import Person
from infer.evaluation.pictures import (
    noise_pictures,
    painter,
    painters,
    photographs,
    portraits,
    seeds_of,
    through_vae,
)
from infer.generate import generate
from infer.identity import Identity
from infer.pipelines import ConsistentIDPipeline
from infer.portrait import portrait_seed
from stages.codec import Image
from tests.infer.helpers import small


@pytest.fixture(scope="module")
def settings(adapter: Path) -> InferConfig:
    return small(
        adapter,
        prompts=("a man", "a woman"),
        batch_size=2,
        num_inference_steps=2,
        start_merge_step=1,
    )


def differ(one: list[Image], other: list[Image]) -> list[bool]:
    return [not np.array_equal(*pair) for pair in zip(one, other, strict=True)]


def test_portraits_are_those_of_generate(
    pipe: ConsistentIDPipeline, person: Identity, settings: InferConfig
) -> None:
    expected = [portrait.pixels for portrait in generate(pipe, person, settings)]
    seeds = [portrait_seed(settings.seed, prompt, 0) for prompt in (0, 1)]
    paint = painter(pipe, settings, person)
    assert not any(differ(paint(settings.prompts, seeds), expected))
    by_name = portraits(painters(pipe, settings, {"a": person}), "a man", [seeds[0], 7])
    assert list(by_name) == ["a"] and len(by_name["a"]) == 2
    assert np.abs(by_name["a"][0].astype(int) - expected[0]).max() <= 1


def test_without_a_person_pictures_are_the_bases_own(
    pipe: ConsistentIDPipeline,
    loaded: ConsistentIDPipeline,
    person: Identity,
    settings: InferConfig,
) -> None:
    before = painter(pipe, settings, person)(["a man"], [3])
    scheduler = pipe.scheduler
    own = painter(pipe, settings, None)(["a man"], [3])
    assert pipe.adapter.is_in(pipe.unet) and pipe.scheduler is scheduler
    assert not any(differ(painter(pipe, settings, person)(["a man"], [3]), before))
    stock = diffusers.StableDiffusionPipeline(**loaded.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    [image] = stock(
        ["a man"],
        negative_prompt=["blurry"],
        num_inference_steps=2,
        guidance_scale=2.0,
        height=32,
        width=32,
        generator=[torch.Generator().manual_seed(3)],
    ).images
    assert not any(differ(own, [np.asarray(image)])) and all(differ(own, before))
    assert not any(differ(painter(loaded, settings, None)(["a man"], [3]), own))


def test_seeds_are_of_their_names() -> None:
    assert seeds_of(3, 1, "a")[:2] == seeds_of(2, 1, "a")
    assert len({*seeds_of(3, 1, "a"), *seeds_of(3, 1, "b"), *seeds_of(3, 2, "a")}) == 9


def test_pictures_go_through_the_vae(pipe: ConsistentIDPipeline, people: list[Person]) -> None:
    photos = photographs([person.reference for person in people[:2]], 32)
    pixels = torch.from_numpy(photos[1]).permute(2, 0, 1)[None] / 127.5 - 1
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def decoded(latents: torch.Tensor) -> Image:
        [image] = pipe.image_processor.postprocess(pipe.vae.decode(latents).sample, "np")
        return np.asarray(image * 255)

    with torch.no_grad():
        expected = decoded(pipe.vae.encode(pixels).latent_dist.mode())
        expected_noise = decoded(noise / pipe.vae.config.scaling_factor)
    assert np.abs(through_vae(pipe, photos)[1] - expected).max() <= 1
    assert np.abs(noise_pictures(pipe, [1], 32)[0] - expected_noise).max() <= 1
    first, again, other = noise_pictures(pipe, [1, 1, 2], 32)
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    assert differ([first, first], [again, other]) == [False, True]


def test_calibration_has_its_rows(
    pipe: ConsistentIDPipeline,
    people: list[Person],
    references: dict[str, MeasuredPicture],
    settings: InferConfig,
    measurer: FaceMeasurer,
) -> None:
    chosen = people[:2]
    both = [replace(chosen[0], records=(chosen[0].reference, chosen[1].reference)), chosen[1]]
    rows = calibration(pipe, settings, both, references, "a man", [1], measurer, seed=1)
    assert list(rows) == [
        "photograph",
        "photograph_vae",
        "another_photograph_vae",
        "another_person",
        "noise",
        "base",
    ]
    photograph = rows["photograph"].resemblance["arcface"]
    assert photograph.first.mean == 1 and photograph.advantage.low > 0.3
    stranger = rows["another_person"].resemblance["arcface"]
    assert stranger.first.mean == 0 and stranger.advantage.high < 0
    assert [person.person for person in photograph.people] == [person.name for person in both]
    assert rows["another_photograph_vae"].portraits == 1 and rows["base"].portraits == 2
    assert rows["noise"].has_face.mean == rows["base"].has_face.mean == 0  # of random weights
    json.dumps({row: asdict(measures) for row, measures in rows.items()})
    single = calibration(pipe, settings, chosen, references, "a man", [1], measurer, seed=1)
    assert "another_photograph_vae" not in single


def test_a_pipelines_models_are_those_that_are_measured(pipe: ConsistentIDPipeline) -> None:
    model = adapted_model(pipe, batch_size=4)
    assert model.adapter is pipe.adapter.model and model.base.unet is pipe.unet
    assert model.side == 64 and model.batch_size == 4
    assert len(model.base.tokenizer) == len(pipe.tokenizer) + 2
