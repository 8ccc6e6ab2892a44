"""One training step's arithmetic, from a micro-batch on the device to its losses.

Nothing here waits for the device: no number is read back, no shape depends on a value there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import ConfigError
from configs.schema import LossConfig
from model.consistentid import (
    BaseModels,
    ConsistentID,
    Features,
    encode_images,
    encode_text,
    predict_noise,
)
from model.losses import localisation_loss, noise_loss
from train.data import TrainBatch

LOSSES = ("loss", "noise_loss", "facial_loss")  # the order of `StepLosses.values`


class TrainedModel(nn.Module):
    """The adapter and the UNet it sits in, as the one module that accelerate wraps: its forward is
    a step's.
    """

    def __init__(self, adapter: ConsistentID, unet: Any) -> None:
        super().__init__()
        self.adapter = adapter
        self.unet = unet

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        features: Features,
        token_idx: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The prediction (B, 4, h, w), and the hooked layers' region scores if `token_idx` (B, 5)
        asks for them.
        """
        states = self.adapter.prepare(features)
        extra = {} if time_ids is None else {"pooled": features.pooled, "time_ids": time_ids}
        return predict_noise(self.unet, noisy, timesteps, states, token_idx=token_idx, **extra)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """What never trains. zero_hidden: (1, N, V), the image tower's states of a zero picture, made
    once per run.
    """

    base: BaseModels
    noise_schedule: Any
    zero_hidden: Tensor

    @property
    def device(self) -> torch.device:
        return self.zero_hidden.device


def freeze(base: BaseModels, vision_size: int) -> Frozen:
    """The frozen side of training on models that stand on their device.

    Raises ConfigError for a base that predicts neither noise nor velocity.
    """
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler.from_config(base.scheduler.config)
    kind = schedule.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ConfigError(
            f"the base model predicts {kind!r}; training knows epsilon and v_prediction."
        )
    device = next(base.image_encoder.parameters()).device
    schedule.alphas_cumprod = schedule.alphas_cumprod.to(device)
    zero = torch.zeros(1, 3, vision_size, vision_size, device=device)
    return Frozen(
        base=base, noise_schedule=schedule, zero_hidden=encode_images(base.image_encoder, zero)
    )


@torch.no_grad()
def frozen_features(frozen: Frozen, batch: TrainBatch) -> Features:
    """As `model.consistentid.encode_frozen`, but the image tower sees only pictures that aren't
    zero, all at once.
    """
    size, slots = batch.token_valid.shape
    rows = frozen.zero_hidden.expand(size * (1 + slots), -1, -1).clone()
    if len(batch.pictures):
        rows.index_copy_(
            0, batch.picture_rows, encode_images(frozen.base.image_encoder, batch.pictures)
        )
    hidden = rows.reshape(size, 1 + slots, *rows.shape[1:])
    text_hidden, pooled = encode_text(frozen.base, batch.input_ids, batch.input_ids_2)
    return Features(
        text_hidden=text_hidden,
        pooled=pooled,
        clip_hidden=hidden[:, 0],
        region_hidden=hidden[:, 1:],
        identity=batch.identity,
        token_mask=batch.token_mask,
        token_valid=batch.token_valid,
    )


@torch.no_grad()
def noised_latents(frozen: Frozen, batch: TrainBatch) -> tuple[Tensor, Tensor]:
    """Noisy latents at the batch's timesteps, and what is to be predicted of them: (B, 4, h, w)
    float32 each.
    """
    vae, schedule = frozen.base.vae, frozen.noise_schedule
    posterior = vae.encode(batch.pixels.to(vae.dtype)).latent_dist
    latents = (
        posterior.mean + posterior.std * batch.latent_noise
    ).float() * vae.config.scaling_factor
    noisy: Tensor = schedule.add_noise(latents, batch.noise, batch.timesteps)
    if schedule.config.prediction_type == "v_prediction":
        return noisy, schedule.get_velocity(latents, batch.noise, batch.timesteps)
    return noisy, batch.noise


def snr_weights(schedule: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """(B,): min-SNR-γ weights (Hang et al. 2023, arXiv 2303.09556) of the predicted noise or
    velocity.
    """
    kept = schedule.alphas_cumprod[timesteps].float()
    snr = kept / (1 - kept)
    velocity = schedule.config.prediction_type == "v_prediction"
    weights: Tensor = snr.clamp(max=gamma) / (snr + 1 if velocity else snr)
    return weights


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLosses:
    """total: what is to be minimised. values: (3,), LOSSES without gradients, left on the device."""

    total: Tensor
    values: Tensor


def step_losses(
    trained: nn.Module, frozen: Frozen, batch: TrainBatch, config: LossConfig, *, mask: bool
) -> StepLosses:
    """The losses of a micro-batch on the device. mask: leave the background out of the noise loss."""
    features = frozen_features(frozen, batch)
    noisy, target = noised_latents(frozen, batch)
    height, width = batch.pixels.shape[-2:]
    time_ids = None
    if features.pooled is not None:  # SDXL: original size, crop's corner, target size
        time_ids = torch.zeros(len(noisy), 6, device=noisy.device)
        for column, side in zip((0, 1, 4, 5), (height, width, height, width), strict=True):
            time_ids[:, column].fill_(side)
    token_idx = batch.token_idx if config.facial_weight else None
    prediction, scores = trained(
        noisy, batch.timesteps, features, token_idx=token_idx, time_ids=time_ids
    )
    weights = (
        snr_weights(frozen.noise_schedule, batch.timesteps, config.snr_gamma)
        if config.snr_gamma
        else None
    )
    noise = noise_loss(prediction, target, batch.foreground if mask else None, weights)
    facial = (
        localisation_loss(scores, batch.region_masks, batch.token_valid)
        if scores
        else torch.zeros_like(noise)
    )
    total = noise + config.facial_weight * facial
    return StepLosses(total=total, values=torch.stack((total, noise, facial)).detach())
