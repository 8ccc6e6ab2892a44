"""Noise on latents, as training adds it, and what the UNet is to predict of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from configs.errors import ConfigError


def noise_schedule(scheduler: Any, device: torch.device) -> Any:
    """Returns the DDPMScheduler with the noise of a base model's scheduler, its table on `device`.

    Raises ConfigError for a base that predicts neither noise nor velocity.
    """
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler.from_config(scheduler.config)
    kind = schedule.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ConfigError(
            f"the base model predicts {kind!r}; training supports epsilon and v_prediction. Choose "
            "another model.base."
        )
    schedule.alphas_cumprod = schedule.alphas_cumprod.to(device)
    return schedule


def noised(
    schedule: Any,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns noisy latents, and the target to predict: the noise or the velocity.

    schedule: of `noise_schedule`. latents, noise and both results: (B, 4, h, w). timesteps: (B,).
    added: what the latents get in place of the noise that is to be predicted.
    """
    noisy: Tensor = schedule.add_noise(latents, noise if added is None else added, timesteps)
    if schedule.config.prediction_type == "v_prediction":
        return noisy, schedule.get_velocity(latents, noise, timesteps)
    return noisy, noise
