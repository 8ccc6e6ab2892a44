"""The base model a run stands on: a public one by name, or the tiny one, made here.

No size of Stable Diffusion is small enough for a laptop's CPU, so the `tiny` model has no public
base. Its parts are real classes with random weights; the VAE alone is fitted to the pictures at
hand for some seconds, since latents of a random VAE can't be turned back into pictures. Text
encoder and image tower stay random.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn import functional as F

from configs.schema import TrainConfig
from model.conditions import training_pixels
from model.spec import ModelSpec
from train import draws
from train.shards import ShardSet

logger = logging.getLogger(__name__)

_FITTED: Final = "fitted.json"
_FIT_STEPS: Final = 200
_FIT_PICTURES: Final = 256
_FIT_BATCH: Final = 8
# pixels; the VAE is convolutional, and pieces of pictures teach it at a quarter of the cost
_FIT_CROP: Final = 32
_FIT_RATE: Final = 2e-3
_KL_WEIGHT: Final = 1e-4  # keeps latents near unit size without blurring them


def ensure_base(
    config: TrainConfig, spec: ModelSpec, shards: ShardSet, say: Callable[[str], None]
) -> str:
    """The base's folder or hub id; makes the tiny one under the output if none is named. Call on
    one process.

    Raises WeightsError if the tiny base's vocabulary can't be had.
    """
    named = config.model.base or spec.base
    if named:
        return named
    from model.tiny import make_tiny_base
    from stages.backends.weights import Weights

    folder = Path(config.output) / "base"
    if not (folder / _FITTED).is_file():
        say(
            f"model {spec.name!r}: making a small base with random weights in {folder} and "
            "fitting its VAE to these "
            "pictures. It shows that every part works together; it is no Stable Diffusion."
        )
        make_tiny_base(folder, Weights(config.weights).fetch("clip_bpe"), config.seed)
        error = fit_vae(folder, shards, resolution=config.resolution, seed=config.seed)
        fitted = {"data": shards.digest, "mean_absolute_error": round(error, 4)}
        (folder / _FITTED).write_text(json.dumps(fitted) + "\n")
    return str(folder)


def fit_vae(
    base: Path, shards: ShardSet, *, resolution: int, seed: int, steps: int = _FIT_STEPS
) -> float:
    """Train the VAE in `base` on the data set's pictures, in place; the last steps' mean absolute
    error, in [0, 2].

    Afterwards its scaling factor makes these pictures' latents of unit variance, as Stable
    Diffusion's does.
    """
    import diffusers

    count = min(len(shards), _FIT_PICTURES)
    chosen = draws.permutation(len(shards), seed, "vae_pictures", 0)[:count].tolist()
    pictures = torch.stack(
        [training_pixels(record, resolution) for record in shards.records(chosen)]
    )
    vae: Any = diffusers.AutoencoderKL.from_pretrained(base / "vae")
    vae.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=_FIT_RATE, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _FIT_RATE, total_steps=steps, pct_start=0.1
    )
    errors: list[torch.Tensor] = []
    for step in range(steps):
        batch = _pieces(pictures, draws.generator(seed, "vae_batch", step))
        posterior = vae.encode(batch).latent_dist
        noise = draws.normal(tuple(posterior.mean.shape), seed, "vae_noise", step)
        decoded = vae.decode(posterior.mean + posterior.std * noise, return_dict=False)[0]
        error = F.l1_loss(decoded, batch)
        loss = error + _KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        errors.append(error.detach())
    vae.eval()
    with torch.no_grad():
        latents = torch.cat(
            [vae.encode(part).latent_dist.mean for part in torch.split(pictures, 32)]
        )
    vae.register_to_config(scaling_factor=round(1.0 / float(latents.std()), 5))
    vae.save_pretrained(base / "vae")
    return float(torch.stack(errors[-20:]).mean())


def _pieces(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A batch of equal pieces, all from the same place of different pictures."""
    rows = torch.randint(len(pictures), (_FIT_BATCH,), generator=generator)
    side = min(_FIT_CROP, pictures.shape[-1])
    top, left = torch.randint(pictures.shape[-1] - side + 1, (2,), generator=generator).tolist()
    return pictures[rows, :, top : top + side, left : left + side]
