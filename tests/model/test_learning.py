"""The tiny model learns eight portraits, and uses their conditions."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn import functional as F

from model.conditions import build_conditions, collate
from model.consistentid import BaseModels, ConsistentID, Features, encode_frozen, predict_noise
from model.losses import localisation_loss, noise_loss
from model.pixels import training_pixels
from model.spec import SPECS
from train.shards import ShardSet

TINY = SPECS["tiny"]


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_eight_portraits_are_learnt_by_their_conditions(base: BaseModels, shards: ShardSet) -> None:
    torch.manual_seed(0)
    records = list(shards.records(range(8)))
    model = ConsistentID(TINY, base.unet, "corrected")
    batch = collate(
        [build_conditions(r, base.tokenizer, TINY, "corrected", resolution=32) for r in records]
    )
    features = encode_frozen(base, batch)
    # in place of a fitted VAE
    small = F.avg_pool2d(torch.stack([training_pixels(r, 32) for r in records]), 8)
    small = torch.cat((small, small.mean(1, keepdim=True)), 1) * 1.5
    # two draws of noise for each portrait and step
    latents, token_idx, token_valid, region_masks = (
        torch.cat([values] * 2)
        for values in (small, batch.token_idx, batch.token_valid, batch.region_masks)
    )
    schedule = DDPMScheduler.from_config(base.scheduler.config)
    base.unet.requires_grad_(True)
    parameters = list({id(p): p for p in (*model.parameters(), *base.unet.parameters())}.values())
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, fused=True)

    def step(features: Features, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (len(latents),), generator=generator)
        noisy = schedule.add_noise(latents, noise, timesteps)
        context = torch.cat([model.prepare(features)] * 2)
        prediction, scores = predict_noise(
            base.unet, noisy, timesteps, context, token_idx=token_idx
        )
        localisation = localisation_loss(scores, region_masks, token_valid)
        return noise_loss(prediction, noise), localisation

    @torch.no_grad()
    def mean_losses(features: Features) -> tuple[list[float], float]:
        """Returns three noise losses, each of 16 draws a portrait, and the localisation loss."""
        pairs = [
            [step(features, 10_000 + 100 * seed + draw) for draw in range(8)] for seed in range(3)
        ]
        noise = [sum(float(pair[0]) for pair in draws) / 8 for draws in pairs]
        return noise, sum(float(pair[1]) for draws in pairs for pair in draws) / 24

    before = mean_losses(features)
    for number in range(90):
        noise, localisation = step(features, number)
        optimizer.zero_grad()
        (noise + 0.01 * localisation).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    after = mean_losses(features)
    rolled = {
        name: getattr(features, name).roll(1, 0)
        for name in ("clip_hidden", "region_hidden", "identity")  # the texts are alike
    }
    swapped = mean_losses(replace(features, **rolled))
    print(f"noise loss {before[0]} → {after[0]}, with another person's conditions {swapped[0]}")
    assert max(after[0]) < 0.5 * min(before[0])
    spread = max(after[0]) - min(after[0])
    gaps = [other - own for other, own in zip(swapped[0], after[0], strict=True)]
    assert min(gaps) > spread, "another person's conditions must give a larger loss"
    assert after[1] < before[1] - 0.1, "attention must have moved into the regions"
