"""Fixtures: four people of the data set, measured, and the models that measure them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from infer.evaluation.denoising import AdaptedModel, noisy_samples
from infer.evaluation.faces import FaceMeasurer, MeasuredPicture
from infer.evaluation.people import Person, by_person, held_out_people
from infer.evaluation.pictures import photographs
from infer.identity import Identity
from infer.pipelines import ConsistentIDPipeline
from model.conditions import collate
from model.consistentid import ConsistentID, encode_frozen, predict_noise
from model.losses import localisation_loss, noise_errors
from model.noising import noise_schedule
from model.spec import SPECS, ModelSpec
from stages.storage.reader import DatasetReader
from tests.bases import base_copy

TINY = SPECS["tiny"]


@pytest.fixture(scope="session")
def measurer() -> FaceMeasurer:
    return FaceMeasurer()


@pytest.fixture(scope="session")
def people(data: Path) -> list[Person]:
    """Four people, each with one photograph."""
    return held_out_people(DatasetReader(str(data)), 4, seed=3, split="all")


@pytest.fixture(scope="session")
def references(people: list[Person], measurer: FaceMeasurer) -> dict[str, MeasuredPicture]:
    return by_person(people, measurer.records([person.reference for person in people]))


@pytest.fixture(scope="session")
def small_photos(people: list[Person], measurer: FaceMeasurer) -> dict[str, MeasuredPicture]:
    """The people's photographs at 64 pixels."""
    photos = photographs([person.reference for person in people], 64)
    return by_person(people, measurer.pictures(photos))


@pytest.fixture(scope="session")
def identities(pipe: ConsistentIDPipeline, people: list[Person]) -> dict[str, Identity]:
    return {person.name: pipe.encode_identity(person.reference) for person in people}


def new_adapter(tiny_base: Path, spec: ModelSpec = TINY) -> AdaptedModel:
    """An adapter as training begins with it."""
    base = base_copy(TINY, tiny_base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = ConsistentID(spec, base.unet, "corrected")
    return AdaptedModel(base=base, adapter=adapter, resolution=32)


@pytest.fixture(scope="session")
def untrained(tiny_base: Path) -> AdaptedModel:
    return new_adapter(tiny_base)


@pytest.fixture(scope="session")
def learnt(tiny_base: Path, people: list[Person]) -> AdaptedModel:
    """The tiny model, which has learnt two people's samples by their right conditions, and where
    their regions are.
    """
    model = new_adapter(tiny_base)
    base, adapter = model.base, model.adapter
    pair = people[:2]
    samples = noisy_samples(model, pair, seed=4, timesteps=(500, 900))
    conditions = [model.conditions(each.reference, each.reference) for each in pair]
    batch = collate([each for each in conditions for _ in samples.timesteps])
    features = encode_frozen(base, batch)
    rows = [(sample, timestep) for sample in (0, 1) for timestep in samples.timesteps]
    noise, timesteps = samples.noise(rows), torch.tensor([timestep for _, timestep in rows])
    schedule = noise_schedule(base.scheduler, torch.device("cpu"))
    noisy = schedule.add_noise(samples.latents[[sample for sample, _ in rows]], noise, timesteps)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=5e-3, fused=True)
    for _ in range(12):
        prediction, scores = predict_noise(
            base.unet, noisy, timesteps, adapter.prepare(features), token_idx=batch.token_idx
        )
        outside = localisation_loss(scores, batch.region_masks, batch.token_valid)
        loss = noise_errors(prediction, noise).mean() + 0.1 * outside
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model
