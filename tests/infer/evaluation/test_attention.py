"""Attention inside the masks: planted attention, and that of a real UNet."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError
from infer.evaluation.attention import attention_ratio, attention_shares, share_inside
from infer.evaluation.denoising import AdaptedModel, adapted_model, denoised, noisy_samples
from infer.evaluation.people import Person
from infer.pipelines import ConsistentIDPipeline
from tests.infer.evaluation.conftest import TINY, new_adapter


@pytest.fixture(scope="module")
def model(pipe: ConsistentIDPipeline) -> AdaptedModel:
    return adapted_model(pipe)


def test_attention_inside_its_mask_has_a_share_of_one() -> None:
    masks = torch.zeros(1, 2, 32, 32)
    masks[0, 0, :16, :16] = 1  # a quarter of the picture
    masks[0, 1, :, 8:] = 1
    inside, even = torch.zeros(1, 3, 64, 2), torch.full((1, 3, 256, 2), 0.01)
    inside.view(1, 3, 8, 8, 2)[:, :, :4, :4, 0] = 0.2
    inside.view(1, 3, 8, 8, 2)[:, :, :, :2, 1] = 0.1  # all of it outside
    assert share_inside([inside], masks)[0].tolist() == pytest.approx([1, 0])
    assert share_inside([even], masks)[0].tolist() == pytest.approx([0.25, 0.75], abs=1e-5)
    assert share_inside([inside, even], masks)[0].tolist() == pytest.approx([0.625, 0.375])
    assert share_inside([torch.zeros(1, 3, 64, 2)], masks)[0].tolist() == [0, 0]


def test_shares_of_samples_are_means_over_timesteps(
    model: AdaptedModel, people: list[Person]
) -> None:
    measured = attention_shares(replace(model, batch_size=3), people[:2], seed=5, timesteps=(9, 99))
    conditions = [model.conditions(each.reference, each.reference) for each in people[:2]]
    for row, person in enumerate(people[:2]):
        samples = noisy_samples(model, [person], seed=5, timesteps=(9, 99))
        [rows] = denoised(model, samples, conditions[row : row + 1], scores=True)
        masks = conditions[row].region_masks.expand(2, -1, -1, -1)
        expected = share_inside(rows.scores, masks).mean(0)
        own = measured.people[person.name]
        assert tuple(own) == conditions[row].regions and len(own) >= 4
        assert list(own.values()) == pytest.approx(expected[: len(own)].tolist(), rel=1e-3)
    means = [sum(own.values()) / len(own) for own in measured.people.values()]
    assert measured.overall.inside.mean == pytest.approx(sum(means) / 2)
    nose = [measured.people[person.name]["nose"] for person in people[:2]]
    assert measured.regions["nose"].inside.mean == pytest.approx(sum(nose) / 2)
    area = [float(c.region_masks[c.regions.index("nose")].mean()) for c in conditions]
    assert measured.regions["nose"].area.mean == pytest.approx(sum(area) / 2)
    json.dumps(asdict(measured))


def test_attention_that_has_learnt_the_masks_is_inside_them(
    untrained: AdaptedModel, learnt: AdaptedModel, people: list[Person]
) -> None:
    before, after = (
        attention_shares(each, people[:2], seed=4, timesteps=(500, 900))
        for each in (untrained, learnt)
    )
    growth = attention_ratio(after, before, seed=1)
    assert growth.low > 1.3 and growth.identities == 2
    assert growth.mean == pytest.approx(after.overall.inside.mean / before.overall.inside.mean)
    assert after.overall.area == before.overall.area


def test_a_unet_without_hooked_layers_is_an_error(tiny_base: Path, people: list[Person]) -> None:
    model = new_adapter(tiny_base, replace(TINY, hooked=("up_blocks.9",)))
    with pytest.raises(ConfigError, match=r"none of the layers up_blocks\.9"):
        attention_shares(model, people[:2], seed=5, timesteps=(99,))
