"""Noise losses: equal to a written-out one, and what they show of an adapter that learnt people."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from configs.errors import ConfigError
from infer.evaluation.denoising import AdaptedModel, adapted_model, denoised, noisy_samples
from infer.evaluation.losses import noise_losses
from infer.evaluation.people import Person
from infer.pipelines import ConsistentIDPipeline
from model.conditions import build_conditions, collate
from model.consistentid import encode_frozen, predict_noise
from model.losses import noise_errors
from model.noising import noise_schedule
from model.pixels import training_pixels
from model.spec import SPECS

TINY = SPECS["tiny"]


@pytest.fixture(scope="module")
def model(pipe: ConsistentIDPipeline) -> AdaptedModel:
    return replace(adapted_model(pipe), resolution=32)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_losses_are_those_of_a_written_out_step(
    model: AdaptedModel, people: list[Person], kind: str
) -> None:
    scheduler = model.base.scheduler
    scheduler = type(scheduler).from_config(scheduler.config, prediction_type=kind)
    base = replace(model.base, scheduler=scheduler)
    model = replace(model, base=base, batch_size=3)
    measured = noise_losses(model, people[:2], seed=4, timesteps=(100, 700))
    first, second = people[:2]
    samples = noisy_samples(model, people[:2], seed=4, timesteps=(100, 700))
    vae, schedule = base.vae, noise_schedule(scheduler, torch.device("cpu"))
    pixels = training_pixels(second.reference, 32)[None]
    latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    conditions = build_conditions(
        second.reference,
        base.tokenizer,
        TINY,
        "corrected",
        resolution=32,
        reference=first.reference,
    )
    states = model.adapter.prepare(encode_frozen(base, collate([conditions])))
    for row, timestep in enumerate((100, 700)):
        noise, alpha = samples.noise([(1, timestep)]), schedule.alphas_cumprod[timestep]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        target = velocity if kind == "v_prediction" else noise
        prediction, _ = predict_noise(base.unet, noisy, torch.tensor([timestep]), states)
        expected = float(noise_errors(prediction, target))
        assert measured.people[1].swapped[row] == pytest.approx(expected, rel=1e-4)
        assert measured.people[1].right[row] != pytest.approx(expected, rel=1e-4)


def test_noise_depends_on_person_and_timestep_only(
    model: AdaptedModel, people: list[Person]
) -> None:
    both = noisy_samples(model, people[:2], seed=4, timesteps=(1, 2))
    alone = noisy_samples(model, people[1:2], seed=4, timesteps=(2,))
    assert torch.equal(both.noise([(1, 2)]), alone.noise([(0, 2)]))
    assert len({float(noise.sum()) for noise in both.noise([(0, 1), (0, 2), (1, 1), (1, 2)])}) == 4
    assert torch.allclose(both.latents[1:], alone.latents, atol=1e-5)


def test_another_or_no_identity_costs_loss_where_it_was_learnt(
    learnt: AdaptedModel, people: list[Person]
) -> None:
    measured = noise_losses(learnt, people[:2], seed=4, timesteps=(500, 900))
    assert measured.swapped_minus_right.low > 0 and measured.none_minus_right.low > 0
    for name in ("swapped", "none"):
        difference = getattr(measured, f"{name}_minus_right")
        other = getattr(measured, name)
        assert difference.mean == pytest.approx(other.mean - measured.right.mean)
    assert json.loads(json.dumps(asdict(measured)))["people"][1]["other"] == people[0].name


def test_with_the_wrong_people_as_references_the_difference_turns_round(
    learnt: AdaptedModel, people: list[Person]
) -> None:
    first, second = people[:2]
    wrong = [  # each one's sample with the other's photograph as reference
        replace(first, records=(second.reference, first.reference)),
        replace(second, records=(first.reference, second.reference)),
    ]
    right = noise_losses(learnt, people[:2], seed=4, timesteps=(500, 900))
    measured = noise_losses(learnt, wrong, seed=4, timesteps=(500, 900))
    assert measured.swapped_minus_right.high < 0
    assert measured.right.mean == pytest.approx(right.swapped.mean, rel=1e-4)
    assert measured.swapped.mean == pytest.approx(right.right.mean, rel=1e-4)


def test_the_dropped_identity_is_that_of_training(
    model: AdaptedModel, people: list[Person]
) -> None:
    samples = noisy_samples(model, people[:2], seed=4, timesteps=(500,))
    first, other = people[0].reference, people[2].reference
    losses = []
    for reference in (first, other):  # whoever it is
        conditions = [model.conditions(first, reference)] * 2
        [rows] = denoised(model, samples, conditions, without_identity=True)
        losses.append(rows.errors)
    same_text = torch.equal(
        *(model.conditions(first, reference).input_ids for reference in (first, other))
    )
    assert same_text and torch.equal(*losses)


def test_impossible_timesteps_and_a_single_person_are_errors(
    model: AdaptedModel, people: list[Person]
) -> None:
    with pytest.raises(ConfigError, match=r"timesteps=\(0, 1000\): expected numbers from 0 to 999"):
        noise_losses(model, people[:2], seed=4, timesteps=(0, 1000))
    with pytest.raises(ConfigError, match="1 people are given, expected at least 2"):
        noise_losses(model, people[:1], seed=4)
