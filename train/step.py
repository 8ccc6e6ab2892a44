"""The computation of a training step: from a micro-batch on the device to its losses.

Nothing here makes the host wait for the device: no value is read from it, and no tensor's shape
depends on values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from configs.training import LossConfig
from model.consistentid import (
    BaseModels,
    ConsistentID,
    Features,
    encode_images,
    predict_noise,
)
from model.losses import localisation_errors, noise_errors
from model.noising import noise_schedule, noised
from train import draws
from train.data import TrainBatch
from train.encodings import Encodings
from train.packing import IMAGES
from train.texts import empty_text_ids, split_states, text_ids, text_states

LOSSES = ("loss", "noise_loss", "facial_loss")  # the order of `StepLosses.values`


class TrainedModel(nn.Module):
    """The adapter and its UNet as one module, which accelerate wraps.

    Its forward pass contains every trained parameter, as distributed training requires.
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
        """Returns the UNet's prediction (B, 4, h, w) and the hooked layers' region scores.

        noisy: latents (B, 4, h, w). timesteps: (B,). token_idx: (B, 5); without it there are no
        scores. time_ids: (B, 6), of SDXL.
        """
        states = self.adapter.prepare(features)
        extra = {} if time_ids is None else {"pooled": features.pooled, "time_ids": time_ids}
        # The UNet computes in its own precision. Autocast would compute its norms in float32.
        with torch.autocast(noisy.device.type, enabled=False):
            return predict_noise(self.unet, noisy, timesteps, states, token_idx=token_idx, **extra)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """What never trains.

    noise_schedule: a DDPMScheduler. zero_hidden: (1, N, V), the image encoder's states of a zero
    image. empty_text: (1, 77 · C + P), the row of the empty text (train/texts.py). hidden:
    CLIP-normalised images (N, 3, S, S) → the image encoder's states (N, tokens, V). moments: images
    (N, 3, H, W) → mean and log variance of the VAE's posterior (N, 8, h, w). texts: ids (N, 2, 77)
    → rows (N, 77 · C + P).
    """

    base: BaseModels
    noise_schedule: Any
    zero_hidden: Tensor
    empty_text: Tensor
    hidden: Encodings
    moments: Encodings
    texts: Encodings

    @property
    def device(self) -> torch.device:
        return self.zero_hidden.device


def freeze(
    base: BaseModels, vision_size: int, keep: int = 0, features: Collection[str] = ()
) -> Frozen:
    """Makes the frozen side of training from a base model that is on its device.

    vision_size: side of the image encoder's input, in pixels. keep: number of samples whose
    encodings stay in memory. features: kinds whose encoders aren't needed any more; their memory is
    freed. Raises ConfigError for a base that predicts neither noise nor velocity.
    """
    device = next(base.image_encoder.parameters()).device
    schedule = noise_schedule(base.scheduler, device)
    zero = torch.zeros(1, 3, vision_size, vision_size, device=device)
    zero_hidden = encode_images(base.image_encoder, zero)
    empty_text = text_states(base, empty_text_ids(base.tokenizer)[None].to(device))
    encoders = {
        "vae": (base.vae,),
        "image": (base.image_encoder,),
        "text": (base.text_encoder, base.text_encoder_2),
    }
    for encoder in (each for kind in features for each in encoders[kind] if each is not None):
        encoder.to("meta")
    return Frozen(
        base=base,
        noise_schedule=schedule,
        zero_hidden=zero_hidden,
        empty_text=empty_text,
        hidden=Encodings(partial(encode_images, base.image_encoder), keep * IMAGES),
        moments=Encodings(partial(_moments, base.vae), keep),
        # with pairs, a sample has several texts: a region that the reference lacks gets no mark
        texts=Encodings(partial(text_states, base), keep * IMAGES),
    )


def without_memory(frozen: Frozen) -> Frozen:
    """Returns the same models, whose encodings don't stay in memory."""
    base = frozen.base
    return replace(
        frozen,
        hidden=Encodings(partial(encode_images, base.image_encoder)),
        moments=Encodings(partial(_moments, base.vae)),
        texts=Encodings(partial(text_states, base)),
    )


@torch.no_grad()
def _moments(vae: Any, pixels: Tensor) -> Tensor:
    moments: Tensor = vae.encode(pixels).latent_dist.parameters
    return moments


@torch.no_grad()
def frozen_features(frozen: Frozen, batch: TrainBatch) -> Features:
    """Encodes the texts and images of a batch, as `model.consistentid.encode_frozen` does.

    Only images that aren't zero go through the image encoder, and only texts that aren't empty or
    stored through the text encoders.
    """
    size, slots = batch.token_valid.shape
    zero = frozen.zero_hidden
    states = batch.hidden if len(batch.image_rows) else zero[:0]
    if states is None:
        states = frozen.hidden(batch.image_names, batch.clip_images)
    # each row's place among the zero image's states, which are first, and those of the images
    places = torch.zeros(size * (1 + slots), dtype=torch.int64, device=zero.device)
    places[batch.image_rows] = torch.arange(1, 1 + len(states), device=zero.device)
    rows = torch.cat((zero, states.to(zero.dtype))).index_select(0, places)
    hidden = rows.reshape(size, 1 + slots, *rows.shape[1:])
    text_hidden, pooled = split_states(frozen.base, _texts(frozen, batch))
    return Features(
        text_hidden=text_hidden,
        pooled=pooled,
        clip_hidden=hidden[:, 0],
        region_hidden=hidden[:, 1:],
        identity=batch.identity,
        token_mask=batch.token_mask,
        token_valid=batch.token_valid,
    )


def _texts(frozen: Frozen, batch: TrainBatch) -> Tensor:
    """Returns the rows of a batch's texts, (B, 77 · C + P)."""
    parts = [frozen.empty_text]
    if batch.texts is not None:
        parts.append(batch.texts.to(frozen.empty_text.dtype))
    if len(batch.encoded_texts):
        ids = text_ids(batch.input_ids, batch.input_ids_2).index_select(0, batch.encoded_texts)
        parts.append(frozen.texts(batch.text_names, ids))
    return torch.cat(parts).index_select(0, batch.text_rows)


@torch.no_grad()
def noised_latents(frozen: Frozen, batch: TrainBatch) -> tuple[Tensor, Tensor]:
    """Returns noisy latents at the batch's timesteps, and the target to predict.

    Both are (B, 4, h, w) float32. The target is the noise or the velocity.
    """
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    vae, schedule = frozen.base.vae, frozen.noise_schedule
    if batch.moments is not None:
        moments = batch.moments.float()
    else:
        moments = frozen.moments(batch.pixel_names, batch.pixels.to(vae.dtype))
    posterior = DiagonalGaussianDistribution(moments)
    latents = (
        posterior.mean + posterior.std * batch.latent_noise
    ).float() * vae.config.scaling_factor
    return noised(schedule, latents, batch.noise, batch.timesteps, batch.added_noise)


def snr_weights(schedule: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """Returns the min-SNR-γ weight of each sample's noise loss, (B,).

    Hang et al. 2023, arXiv 2303.09556, for noise or velocity prediction. At an SNR of 0 it is 1 for
    noise and 0 for velocity. timesteps: (B,).
    """
    alphas_cumprod = schedule.alphas_cumprod[timesteps].float()
    snr = alphas_cumprod / (1 - alphas_cumprod)
    velocity = schedule.config.prediction_type == "v_prediction"
    weights: Tensor = (
        snr.clamp(max=gamma) / (snr + 1)
        if velocity
        else (torch.full_like(snr, gamma) / snr).clamp(max=1)
    )
    return weights


def masks_background(config: LossConfig, seed: int, step: int) -> bool:
    """Returns whether the noise loss of a step, counted from 1, leaves out the background. It is
    drawn once for a step, so that it doesn't depend on the number of processes.
    """
    return draws.uniform(seed, "mask", step - 1) < config.mask_loss_prob


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLosses:
    """total: the loss to minimise. values: (3,), the LOSSES without gradients, and errors: (B, 3),
    those of each sample, both on the device. timesteps: (B,), of the samples.
    """

    total: Tensor
    values: Tensor
    errors: Tensor
    timesteps: Tensor


def step_losses(
    trained: nn.Module,
    frozen: Frozen,
    batch: TrainBatch,
    config: LossConfig,
    *,
    mask: bool,
    count: Tensor | None = None,
    mark: Callable[[str], None] = lambda _: None,
) -> StepLosses:
    """Computes the losses of a micro-batch that is on the device.

    trained: a TrainedModel, or accelerate's wrapper of one. mask: leave the background out of the
    noise loss. count: the number of valid samples that the sum of their losses is divided by, a
    scalar on the device; None: those of this micro-batch. With the number in the global batch, the
    losses and gradients of its micro-batches add up to those of the whole. mark: told the parts of
    a step that end here (train.step_clock).
    """
    features = frozen_features(frozen, batch)
    noisy, target = noised_latents(frozen, batch)
    mark("encode")
    time_ids = batch.sizes.float() if features.pooled is not None else None  # of SDXL
    token_idx = batch.token_idx if config.facial_weight else None
    prediction, scores = trained(
        noisy, batch.timesteps, features, token_idx=token_idx, time_ids=time_ids
    )
    weights = (
        snr_weights(frozen.noise_schedule, batch.timesteps, config.snr_gamma)
        if config.snr_gamma
        else None
    )
    noise = noise_errors(prediction, target, batch.foreground if mask else None, weights)
    facial = (
        localisation_errors(scores, batch.region_masks, batch.token_valid)
        if scores
        else torch.zeros_like(noise)
    )
    errors = torch.stack((noise + config.facial_weight * facial, noise, facial), dim=1)
    errors = torch.where(batch.valid[:, None], errors, 0)
    divisor = batch.valid.sum() if count is None else count
    values = errors.sum(0) / divisor.clamp(min=1)
    mark("forward")
    return StepLosses(
        total=values[0],
        values=values.detach(),
        errors=errors.detach(),
        timesteps=batch.timesteps,
    )


def group_gradients(
    trained: nn.Module,
    frozen: Frozen,
    batch: TrainBatch,
    config: LossConfig,
    backward: Callable[[Tensor], None],
) -> None:
    """Lets several processes choose how they send gradients, by a backward pass whose gradients the
    caller throws away.

    DistributedDataParallel groups the gradients anew after its first backward pass, and of sums of
    more than two numbers the last bit depends on the groups. With this pass, a step has the same
    groups in each run, resumed or not.
    """
    backward(step_losses(trained, frozen, batch, config, mask=False).total)
