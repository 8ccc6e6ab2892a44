"""The base model of a run: a public one by name, or the tiny one, made here.

No size of Stable Diffusion is small enough for a laptop's CPU, so the `tiny` model has no public
base. Its parts are diffusers and transformers classes with random weights. Only the VAE is trained,
for some seconds on the data set's images, because latents of a random VAE can't be decoded into
images. Text encoder and image encoder stay random.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn import functional as F

from configs.errors import ShardError
from configs.training import TrainConfig
from model.pixels import training_pixels
from model.spec import ModelSpec
from train import draws
from train.mixture import Mixture

logger = logging.getLogger(__name__)

_FITTED_FILE: Final = "fitted.json"  # written when the VAE is fitted
_FIT_STEPS: Final = 200
_FIT_IMAGES: Final = 256
_FIT_BATCH: Final = 8
# Pixels. The VAE is convolutional, so it learns from crops at a quarter of the cost.
_FIT_CROP: Final = 32
_FIT_LEARNING_RATE: Final = 2e-3
_KL_WEIGHT: Final = 1e-4  # gives latents about unit variance without blurring the images


def ensure_base(
    config: TrainConfig, spec: ModelSpec, mixture: Mixture, message: Callable[[str], None]
) -> str:
    """Returns the folder or hub id of the base model.

    If neither the configuration nor the spec names one, the tiny base is made in OUT/base, unless
    it is there already; only one process may call this then. message: receives a line for the
    user. Raises WeightsError if the tiny base's vocabulary can't be fetched.
    """
    base = config.model.base or spec.base
    if base:
        return base
    from model.tiny import make_tiny_base
    from stages.backends.weights import Weights

    folder = Path(config.output) / "base"
    if not (folder / _FITTED_FILE).is_file():
        message(
            f"model {spec.name!r}: making a small base model with random weights in {folder} and "
            "fitting its VAE to the data set's images. It shows that all parts work together; "
            "don't expect good portraits."
        )
        make_tiny_base(folder, Weights(config.weights).fetch("clip_bpe"), config.seed)
        error = fit_vae(folder, mixture, resolution=config.resolution, seed=config.seed)
        fit = {"data": mixture.digest, "mean_absolute_error": round(error, 4)}
        (folder / _FITTED_FILE).write_text(json.dumps(fit) + "\n")
    return str(folder)


def fit_vae(
    base: Path, mixture: Mixture, *, resolution: int, seed: int, steps: int = _FIT_STEPS
) -> float:
    """Train the VAE in base/vae on the data set's images, and write it back.

    resolution: side of the images, in pixels. The VAE's scaling factor is set so that the latents
    of these images have unit variance, as Stable Diffusion's have. Returns the mean absolute error
    over the last 20 steps, of pixels in [-1, 1].
    """
    import diffusers

    count = min(len(mixture), _FIT_IMAGES)
    order = draws.Permutation(len(mixture), seed, "vae_pictures", 0)
    numbers = [order[place] for place in range(count)]
    images = _images(mixture, numbers, resolution)
    vae: Any = diffusers.AutoencoderKL.from_pretrained(base / "vae")
    vae.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=_FIT_LEARNING_RATE, weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _FIT_LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    errors: list[torch.Tensor] = []
    for step in range(steps):
        batch = _crops(images, draws.generator(seed, "vae_batch", step))
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
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in torch.split(images, 32)])
    vae.register_to_config(scaling_factor=round(1.0 / float(latents.std()), 5))
    vae.save_pretrained(base / "vae")
    return float(torch.stack(errors[-20:]).mean())


def _images(mixture: Mixture, numbers: list[int], resolution: int) -> torch.Tensor:
    """Returns the images of those samples that can be read, (N, 3, R, R). Raises ShardError if that
    is none of them.
    """
    images = []
    for record in mixture.records(numbers):
        if isinstance(record, ShardError):
            error: Exception = record
            continue
        try:
            images.append(training_pixels(record, resolution))
        except (ValueError, OSError) as damage:
            error = damage
    if not images:
        raise ShardError(f"{mixture}: no sample can be read, for example: {error}")
    return torch.stack(images)


def _crops(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns a batch of crops of random images (N, 3, R, R), all at the same random position."""
    rows = torch.randint(len(images), (_FIT_BATCH,), generator=generator)
    side = min(_FIT_CROP, images.shape[-1])
    top, left = torch.randint(images.shape[-1] - side + 1, (2,), generator=generator).tolist()
    return images[rows, :, top : top + side, left : left + side]
