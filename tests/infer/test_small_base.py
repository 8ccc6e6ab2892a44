"""Portraits with a base of the spec `small`, as it is trained here: latents at half the pixels'
resolution, and noise up to a signal-to-noise ratio of 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from configs.errors import ConfigError
from configs.portraits import AdaptedModelConfig
from infer.generate import generate
from infer.identity import Identity
from infer.load import load_pipeline
from infer.schedulers import known_schedulers, make_scheduler
from model.spec import SPECS
from tests.infer.helpers import small, write_adapter

MEAN, DEVIATION = 2.0, 0.5  # of the latents of `sampled`


@torch.no_grad()
def sampled(scheduler: Any, alphas: Tensor) -> Tensor:
    """Samples with the velocity that a perfect UNet would predict, of latents with normal values.

    alphas: (1000,), the share of the signal at each timestep, in variance, of the UNet's training.
    """
    scheduler.set_timesteps(20)
    noise = torch.randn(1, 4, 48, 48, generator=torch.Generator().manual_seed(0))
    latents = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        alpha = alphas[int(timestep)]
        signal, rest = alpha.sqrt(), (1 - alpha).sqrt()
        noisy = scheduler.scale_model_input(latents, timestep) - signal * MEAN
        variance = alpha * DEVIATION**2 + 1 - alpha
        velocity = signal * rest * noisy / variance - rest * (
            MEAN + signal * DEVIATION**2 * noisy / variance
        )
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def test_every_scheduler_has_the_noise_of_the_base_or_is_refused(small_base: Path) -> None:
    base = diffusers.DDIMScheduler.from_pretrained(small_base / "scheduler")
    refused = []
    for name in known_schedulers():
        try:
            scheduler = make_scheduler(name, base)
        except ConfigError as error:
            assert f"scheduler={name} has no noise with a signal-to-noise ratio of 0" in str(error)
            assert "EulerDiscreteScheduler" in str(error) and name not in str(error)[60:]
            refused.append(name)
            continue
        latents = sampled(scheduler, base.alphas_cumprod)
        assert scheduler.timesteps[0] == 999, name
        assert float(latents.mean()) == pytest.approx(MEAN, abs=0.03), name
        assert 0.3 < float(latents.std()) < 0.6, name
    assert {"HeunDiscreteScheduler", "PNDMScheduler", "LMSDiscreteScheduler"} <= {*refused}
    assert len(refused) < len(known_schedulers()) / 2


def test_portraits_begin_with_noise_alone_and_have_the_requested_size(
    small_base: Path, tmp_path: Path, person: Identity
) -> None:
    adapter = write_adapter(small_base, tmp_path / "adapter", "corrected", SPECS["small"])
    model = AdaptedModelConfig(spec="small", base=str(small_base))
    settings = small(adapter, model=model, prompts=("a",), height=40, width=32)
    pipe = load_pipeline(settings)
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    inputs: list[tuple[Tensor, Any]] = []
    pipe.unet.register_forward_pre_hook(
        lambda _module, arguments, _options: inputs.append(arguments[:2]), with_kwargs=True
    )
    [portrait] = generate(pipe, person, settings)
    assert portrait.pixels.shape == (40, 32, 3) and portrait.settings["spec"] == "small"
    latents, timestep = inputs[0]
    assert latents.shape == (2, 4, 20, 16) and timestep == 999
    assert float(latents.std()) == pytest.approx(1, abs=0.1)
    assert [round(float(each)) for _, each in inputs] == [999, 749, 499, 249]
