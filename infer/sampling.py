"""Sampling: from encoded conditions to a picture, in a handful of functions read top to bottom.

Two phases share the steps: the first is steered by the text alone beside the ID tokens, which lays
out the picture; from `merge_step` on the regions are fused in. Any diffusers scheduler serves, and
any batch: row n of every tensor is picture n.
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

StepCallback = Callable[[int, Tensor], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextStates:
    """hidden: (B, 77, C). pooled: (B, P), or None where the base has one text encoder."""

    hidden: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """`encoder_hidden_states` (B, 81, C) of both phases and of what to steer away from; pooled
    states are SDXL's.
    """

    early: Tensor
    late: Tensor
    negative: Tensor
    pooled_early: Tensor | None = None
    pooled_late: Tensor | None = None
    pooled_negative: Tensor | None = None

    def repeat(self, count: int) -> Guidance:
        """Every row `count` times, rows of one prompt together: several pictures per prompt."""
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
    """Everything the UNet is to be told.

    features: of the described prompt. early: of the text of the first phase. zero_hidden: (1, N,
    V), the image tower's states of zero pixels. strength: (B, 5), see `FacialEncoder`. legacy mode
    fuses zero-pixel regions into the negative text at the positive text's nouns, as the published
    weights expect (REFERENCE.md 7.2).
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
    away = negative.hidden.expand(size, -1, -1)
    if model.mode == "legacy":
        regions = empty[:, None].expand(-1, slots, -1, -1)
        away = model.fuse(away, regions, features.token_mask, features.token_valid)
    return Guidance(
        early=torch.cat((early.hidden.expand(size, -1, -1).to(late.dtype), identity), dim=1),
        late=torch.cat((late, identity), dim=1),
        negative=torch.cat((away.to(late.dtype), no_identity), dim=1),
        pooled_early=_rows(early.pooled, size),
        pooled_late=features.pooled,
        pooled_negative=_rows(negative.pooled, size),
    )


def initial_latents(shape: tuple[int, int, int], seeds: list[int]) -> Tensor:
    """(len(seeds), *shape) unit noise, float32 on the CPU; a picture's noise depends on its own
    seed alone.
    """
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
) -> Tensor:
    """Unit noise (B, 4, h, w) → denoised latents.

    merge_step: how many steps the text alone steers; legacy takes one more (the reference compares
    with `<=`). guidance_scale: 1 or less leaves the negative out. generator: for schedulers that
    add noise on the way; a list has one per picture. extra: further UNet arguments per step, from
    its input, the timestep and its states (a ControlNet's residuals). Raises ValueError for latents
    that don't fit the guidance.
    """
    if len(latents) != len(guidance.late):
        raise ValueError(
            f"{len(latents)} latents for {len(guidance.late)} prompts; repeat the guidance to match"
        )
    scheduler.set_timesteps(steps, device=latents.device)
    options = _step_options(scheduler, eta, generator)
    guided = guidance_scale > 1.0
    time_ids = _time_ids(latents) if guidance.pooled_late is not None else None
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
            away, toward = noise.chunk(2)
            noise = away + guidance_scale * (toward - away)
        latents = scheduler.step(noise.to(latents.dtype), timestep, latents, **options).prev_sample
        if on_step is not None:
            on_step(step, latents)
    return latents


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> npt.NDArray[np.uint8]:
    """Latents (B, 4, h, w) → pictures (B, H, W, 3), RGB."""
    pixels = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
    scaled = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round()
    pictures: npt.NDArray[np.uint8] = scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return pictures


def _rows(pooled: Tensor | None, size: int) -> Tensor | None:
    return None if pooled is None else pooled.expand(size, -1)


def _states(guidance: Guidance, *, first: bool, guided: bool) -> tuple[Tensor, Tensor | None]:
    toward = guidance.early if first else guidance.late
    pooled = guidance.pooled_early if first else guidance.pooled_late
    if not guided:
        return toward, pooled
    both = None
    if pooled is not None and guidance.pooled_negative is not None:
        both = torch.cat((guidance.pooled_negative, pooled))
    return torch.cat((guidance.negative, toward)), both


def _step_options(
    scheduler: Any, eta: float, generator: torch.Generator | list[torch.Generator] | None
) -> dict[str, Any]:
    known = inspect.signature(scheduler.step).parameters
    return {
        name: value for name, value in (("eta", eta), ("generator", generator)) if name in known
    }


def _time_ids(latents: Tensor) -> Tensor:
    """SDXL's (1, 6): original size, crop's corner, target size, in pixels; its VAE halves three
    times.
    """
    height, width = (8 * side for side in latents.shape[-2:])
    return torch.tensor([[height, width, 0, 0, height, width]], device=latents.device)
