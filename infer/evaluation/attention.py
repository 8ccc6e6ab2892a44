"""Where the region tokens' attention goes: the share of it inside the region's mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from configs.errors import ConfigError
from infer.evaluation.denoising import TIMESTEPS, AdaptedModel, denoised, noisy_samples
from infer.evaluation.intervals import Interval, interval, mean, ratio
from infer.evaluation.people import Person
from model.losses import layer_size

_TINY: Final = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionAttention:
    """inside: the share of a token's attention inside its region's mask, 0 to 1. area: the share of
    the picture that the mask covers, which even attention would give.
    """

    inside: Interval
    area: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShares:
    """overall: means over a sample's regions. regions: by name. people: person → region → share."""

    timesteps: tuple[int, ...]
    overall: RegionAttention
    regions: dict[str, RegionAttention]
    people: dict[str, dict[str, float]]


def attention_shares(
    model: AdaptedModel,
    people: Sequence[Person],
    *,
    seed: int,
    timesteps: Sequence[int] = TIMESTEPS,
) -> AttentionShares:
    """Measures the attention of the region tokens in the adapter's hooked layers.

    It needs no training, and an adapter that was trained without the localisation loss has hooked
    layers too. Means are over timesteps, layers and heads. Raises ConfigError if no sample has a
    region, or no layer is hooked.
    """
    samples = noisy_samples(model, people, seed=seed, timesteps=timesteps)
    conditions = [
        model.conditions(record, person.reference)
        for record, person in zip(samples.records, people, strict=True)
    ]
    masks = torch.stack([each.region_masks for each in conditions]).to(model.device)
    shares = torch.zeros(len(people), masks.shape[1], dtype=torch.float64)
    for batch in denoised(model, samples, conditions, scores=True):
        if not batch.scores:
            raise ConfigError(
                f"none of the layers {', '.join(model.adapter.spec.hooked)} is in the UNet, so "
                "there is no attention to measure; name blocks of the UNet in spec.hooked"
            )
        rows = [sample for sample, _ in batch.rows]
        inside = share_inside(batch.scores, masks[rows]).double().cpu()
        shares.index_add_(0, torch.tensor(rows), inside / len(samples.timesteps))
    areas = masks.mean(dim=(2, 3)).double().cpu()
    by_region = {
        name: {
            region: (float(shares[row, slot]), float(areas[row, slot]))
            for slot, region in enumerate(conditions[row].regions)
        }
        for row, name in enumerate(samples.people)
    }
    return AttentionShares(
        timesteps=samples.timesteps,
        overall=_summary(
            {name: list(own.values()) for name, own in by_region.items()}, "overall", seed
        ),
        regions={
            region: _summary(
                {name: [own[region]] for name, own in by_region.items() if region in own},
                region,
                seed,
            )
            for region in dict.fromkeys(key for own in by_region.values() for key in own)
        },
        people={
            name: {region: inside for region, (inside, _) in own.items()}
            for name, own in by_region.items()
        },
    )


def attention_ratio(upper: AttentionShares, lower: AttentionShares, *, seed: int) -> Interval:
    """Returns the ratio of two adapters' shares on the same samples, with its interval."""
    means = [
        {name: mean([*own.values()]) for name, own in shares.people.items()}
        for shares in (upper, lower)
    ]
    return ratio(*means, seed=seed, name="attention, ratio", least=_TINY)


def share_inside(scores: Sequence[Tensor], region_masks: Tensor) -> Tensor:
    """Returns for each region token the share of its attention inside its mask, (B, R).

    scores: for each layer (B, heads, pixels, R), probabilities. region_masks: (B, R, H, W), in
    [0, 1]. The mean over layers and heads.
    """
    layers = []
    for layer in scores:
        # by area, so that a pixel counts by how much of it is inside
        masks = F.interpolate(
            region_masks, size=layer_size(region_masks, layer.shape[2]), mode="area"
        )
        inside = masks.flatten(2).transpose(1, 2)[:, None]  # (B, 1, pixels, R)
        mass = layer.float()
        layers.append(((mass * inside).sum(2) / mass.sum(2).clamp(min=_TINY)).mean(1))
    return torch.stack(layers).mean(0)


def _summary(
    values: Mapping[str, Sequence[tuple[float, float]]], region: str, seed: int
) -> RegionAttention:
    """values: person → (share inside, area) of its regions."""
    inside, area = (
        interval(
            {name: mean([pair[side] for pair in pairs]) for name, pairs in values.items()},
            seed=seed,
            name=f"attention, {region}",
        )
        for side in (0, 1)
    )
    return RegionAttention(inside=inside, area=area)
