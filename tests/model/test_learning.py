"""The tiny model learns eight portraits, and learns them by their conditions."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn import functional as F

from model.conditions import build_conditions, collate, training_pixels
from model.consistentid import BaseModels, ConsistentID, Features, encode_frozen, predict_noise
from model.losses import localisation_loss, noise_loss
from model.spec import SPECS
from tests.model.portraits import record

TINY = SPECS["tiny"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_eight_portraits_are_learnt_by_their_conditions(base: BaseModels) -> None:
    torch.manual_seed(0)
    records = [record(seed) for seed in range(8)]
    model = ConsistentID(TINY, base.unet, "corrected")
    batch = collate([build_conditions(r, base.tokenizer, TINY, "corrected", resolution=64) for r in records])
    features = encode_frozen(base, batch)
    small = F.avg_pool2d(torch.stack([training_pixels(r, 64) for r in records]), 4)  # stands in for a fitted VAE
    latents = torch.cat((small, small.mean(1, keepdim=True)), 1) * 1.5
    schedule = DDPMScheduler.from_config(base.scheduler.config)
    base.unet.requires_grad_(True)
    parameters = list({id(p): p for p in (*model.parameters(), *base.unet.parameters())}.values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def step(features: Features, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (8,), generator=generator)
        noisy = schedule.add_noise(latents, noise, timesteps)
        answer, scores = predict_noise(base.unet, noisy, timesteps, model.prepare(features), token_idx=batch.token_idx)
        return noise_loss(answer, noise), localisation_loss(scores, batch.region_masks, batch.token_valid)

    @torch.no_grad()
    def mean_losses(features: Features) -> tuple[float, float]:
        pairs = [step(features, 10_000 + seed) for seed in range(8)]
        return tuple(sum(float(pair[i]) for pair in pairs) / len(pairs) for i in (0, 1))  # type: ignore[return-value]

    before = mean_losses(features)
    for number in range(150):
        noise, place = step(features, number)
        optimizer.zero_grad()
        (noise + 0.01 * place).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    after = mean_losses(features)
    rolled = {
        name: getattr(features, name).roll(1, 0)
        for name in ("clip_hidden", "region_hidden", "identity")  # the texts are alike
    }
    swapped = mean_losses(replace(features, **rolled))
    assert after[0] < 0.15 * before[0]
    assert swapped[0] > 1.3 * after[0], "another person's conditions must not do as well"
    assert after[1] < before[1] - 0.1, "attention must have moved into the regions"
