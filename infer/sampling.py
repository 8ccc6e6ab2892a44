"""Sampling: from encoded conditions to images.

The steps have two phases. In the first the UNet is conditioned on the text and the ID tokens, which
determine the composition; from `merge_step` on it is conditioned on the text with fused regions and
the ID tokens. Any diffusers scheduler can be used. Row n of every tensor belongs to image n.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.consistentid import ConsistentID, Features, predict_noise
from stages.regions import Mode

StepCallback = Callable[[int, Tensor], None]  # called with the step's number and its latents


@dataclass(frozen=True, slots=True, kw_only=True)
class TextStates:
    """A text's states. hidden: (B, 77, C). pooled: (B, P), None with one text encoder."""

    hidden: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """The UNet's `encoder_hidden_states`, (B, 81, C) each.

    early, late: of the two phases. negative: of the unconditional branch. The pooled states, (B,
    P), are those of SDXL.
    """

    early: Tensor
    late: Tensor
    negative: Tensor
    pooled_early: Tensor | None = None
    pooled_late: Tensor | None = None
    pooled_negative: Tensor | None = None

    def repeat(self, count: int) -> Guidance:
        """Repeats every row `count` times in place, for several images of each prompt."""
        rows: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        repeated: dict[str, Any] = {
            name: None if x is None else x.repeat_interleave(count, 0) for name, x in rows.items()
        }
        return replace(self, **repeated)


@torch.no_grad()
def guidance_states(
    model: ConsistentID,
    features: Features,
    *,
    early: TextStates,
    negative: TextStates,
    zero_hidden: Tensor,
    strength: Tensor | None = None,
) -> Guidance:
    """Computes the UNet's conditioning for both phases and for the unconditional branch.

    features: of the prompt with its facial description. early: states of the first phase's text;
    negative: of the negative prompt. zero_hidden: (1, N, V), the image encoder's states of zero
    pixels. strength: (B, 5), see `FacialEncoder.forward`. Legacy mode fuses zero-pixel regions into
    the negative text at the positions of the positive text's nouns, as the published weights expect
    (reference: the SD1.5 pipeline's call).
    """
    size, slots = features.token_valid.shape
    empty = zero_hidden.expand(size, -1, -1)
    identity = model.encode_identity(features.identity, features.clip_hidden)
    no_identity = model.encode_identity(torch.zeros_like(features.identity), empty)
    late = model.fuse(
        features.text_hidden,
        features.region_hidden,
        features.token_mask,
        features.token_valid,
        strength,
    )
    negative_text = negative.hidden.expand(size, -1, -1)
    if model.mode == "legacy":
        regions = empty[:, None].expand(-1, slots, -1, -1)
        negative_text = model.fuse(
            negative_text, regions, features.token_mask, features.token_valid
        )
    return Guidance(
        early=torch.cat((early.hidden.expand(size, -1, -1).to(late.dtype), identity), dim=1),
        late=torch.cat((late, identity), dim=1),
        negative=torch.cat((negative_text.to(late.dtype), no_identity), dim=1),
        pooled_early=_rows(early.pooled, size),
        pooled_late=features.pooled,
        pooled_negative=_rows(negative.pooled, size),
    )


def initial_latents(shape: tuple[int, int, int], seeds: list[int]) -> Tensor:
    """Returns standard normal noise, (len(seeds), *shape) float32 on the CPU; one seed a row."""
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


@torch.no_grad()
def denoise(
    unet: Any,
    scheduler: Any,
    guidance: Guidance,
    latents: Tensor,
    *,
    steps: int,
    merge_step: int,
    guidance_scale: float,
    mode: Mode,
    eta: float = 0.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    extra: Callable[[Tensor, Tensor, Tensor], dict[str, Any]] | None = None,
    on_step: StepCallback | None = None,
    vae_factor: int = 8,
) -> Tensor:
    """Denoises standard normal latents (B, 4, h, w).

    merge_step: number of steps in the first phase; legacy mode adds one, since the reference
    compares with `<=`. guidance_scale: with 1 or less the unconditional branch is not evaluated.
    eta: DDIM's. generator: for schedulers that add noise at every step; a list has one for each
    image. extra: returns further UNet arguments from the UNet's input, the timestep and the states,
    e.g. a ControlNet's residuals. vae_factor: side of the square of pixels that a latent encodes.
    Raises ValueError if latents and guidance differ in batch size.
    """
    if len(latents) != len(guidance.late):
        raise ValueError(
            f"{len(latents)} latents for {len(guidance.late)} prompts; repeat the guidance to match"
        )
    scheduler.set_timesteps(steps, device=latents.device)
    options = _step_options(scheduler, eta, generator)
    guided = guidance_scale > 1.0
    time_ids = _time_ids(latents, vae_factor) if guidance.pooled_late is not None else None
    latents = latents * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps):
        first = step <= merge_step if mode == "legacy" else step < merge_step
        states, pooled = _states(guidance, first=first, guided=guided)
        model_input = scheduler.scale_model_input(
            torch.cat((latents, latents)) if guided else latents, timestep
        )
        noise, _ = predict_noise(
            unet,
            model_input,
            timestep,
            states,
            pooled=pooled,
            time_ids=None if time_ids is None else time_ids.expand(len(states), -1),
            **(extra(model_input, timestep, states) if extra else {}),
        )
        if guided:
            negative, positive = noise.chunk(2)
            noise = negative + guidance_scale * (positive - negative)
        latents = scheduler.step(noise.to(latents.dtype), timestep, latents, **options).prev_sample
        if on_step is not None:
            on_step(step, latents)
    return latents


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> npt.NDArray[np.uint8]:
    """Decodes latents (B, 4, h, w) to RGB images (B, H, W, 3) uint8."""
    pixels = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
    scaled = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round()
    images: npt.NDArray[np.uint8] = scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return images


def _rows(pooled: Tensor | None, size: int) -> Tensor | None:
    return None if pooled is None else pooled.expand(size, -1)


def _states(guidance: Guidance, *, first: bool, guided: bool) -> tuple[Tensor, Tensor | None]:
    """Returns a step's states and pooled states; if `guided`, behind those of the negative text."""
    positive = guidance.early if first else guidance.late
    pooled = guidance.pooled_early if first else guidance.pooled_late
    if not guided:
        return positive, pooled
    pooled_both = None
    if pooled is not None and guidance.pooled_negative is not None:
        pooled_both = torch.cat((guidance.pooled_negative, pooled))
    return torch.cat((guidance.negative, positive)), pooled_both


def _step_options(
    scheduler: Any, eta: float, generator: torch.Generator | list[torch.Generator] | None
) -> dict[str, Any]:
    """Returns those of the options that the scheduler's `step` accepts."""
    accepted = inspect.signature(scheduler.step).parameters
    return {
        name: value for name, value in (("eta", eta), ("generator", generator)) if name in accepted
    }


def _time_ids(latents: Tensor, vae_factor: int) -> Tensor:
    """Returns SDXL's (1, 6): original size, the crop's corner, target size, in pixels."""
    height, width = (vae_factor * side for side in latents.shape[-2:])
    return torch.tensor([[height, width, 0, 0, height, width]], device=latents.device)
