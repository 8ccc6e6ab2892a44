"""Making pictures to measure: from prompts and seeds, with an adapter or by the base alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from configs.portraits import InferConfig
from infer.evaluation.intervals import named_seed
from infer.generate import configured, draw
from infer.identity import Identity
from infer.mixin import ConsistentIDMixin
from model.pixels import training_image, vae_pixels
from stages.codec import Image
from stages.record import Record

# (prompts, seeds), of equal length → a picture of each, RGB (H, W, 3) uint8
Painter = Callable[[Sequence[str], Sequence[int]], list[Image]]


def painter(pipe: ConsistentIDMixin, settings: InferConfig, person: Identity | None) -> Painter:
    """Returns a function that makes pictures on a pipeline.

    settings: how; its prompts, seed and number of images have no effect. person: who is shown;
    None: nobody, and the adapter is taken out of the UNet meanwhile. Equal seeds have equal initial
    noise in both cases. A picture that can't be made is black.
    """

    def paint(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        adapter = pipe.consistentid if person is None else None
        pictures: list[Image] = []
        with configured(pipe, settings), adapter.removed() if adapter else nullcontext():
            for start in range(0, len(prompts), settings.batch_size):
                batch = slice(start, start + settings.batch_size)
                images = draw(pipe, person, settings, prompts[batch], seeds[batch])
                pictures += [np.array(image.convert("RGB")) for image in images]
        return pictures

    return paint


def painters(
    pipe: ConsistentIDMixin, settings: InferConfig, people: Mapping[str, Identity | None]
) -> dict[str, Painter]:
    """Returns a `painter` of each person, by name."""
    return {name: painter(pipe, settings, person) for name, person in people.items()}


def seeds_of(count: int, seed: int, *names: str) -> list[int]:
    """Returns `count` seeds with these names, of which the first n don't depend on `count`."""
    return [named_seed(seed, "pictures", *names, number) for number in range(count)]


def portraits(
    painters: Mapping[str, Painter], prompt: str, seeds: Sequence[int]
) -> dict[str, list[Image]]:
    """Returns each person's pictures of a prompt, one for each seed."""
    return {name: paint([prompt] * len(seeds), seeds) for name, paint in painters.items()}


def photographs(records: Sequence[Record], side: int) -> list[Image]:
    """Returns the photographs of samples as training sees them, RGB (side, side, 3)."""
    return [training_image(record, side).permute(1, 2, 0).numpy() for record in records]


@torch.no_grad()
def through_vae(pipe: ConsistentIDMixin, pictures: Sequence[Image]) -> list[Image]:
    """Encodes and decodes pictures, RGB (H, W, 3), with the pipeline's VAE."""
    decoded = []
    for picture in pictures:
        pixels = vae_pixels(torch.from_numpy(picture).permute(2, 0, 1)[None])
        pixels = pixels.to(pipe.vae.device, pipe.vae.dtype)
        decoded.append(_decoded(pipe, pipe.vae.encode(pixels).latent_dist.mode()))
    return decoded


@torch.no_grad()
def noise_pictures(pipe: ConsistentIDMixin, seeds: Sequence[int], side: int) -> list[Image]:
    """Decodes latents of pure noise with the pipeline's VAE. side: of the pictures, in pixels."""
    config, side = pipe.vae.config, side // pipe.vae_scale_factor
    shape = (1, config.latent_channels, side, side)
    return [
        _decoded(
            pipe,
            torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            / config.scaling_factor,
        )
        for seed in seeds
    ]


def _decoded(pipe: ConsistentIDMixin, latents: Tensor) -> Image:
    """latents: (1, 4, h, w), not scaled."""
    pixels = pipe.vae.decode(latents.to(pipe.vae.device, pipe.vae.dtype)).sample[0].float()
    values = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(values.permute(1, 2, 0).cpu().numpy())
