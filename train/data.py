"""Micro-batches: prepared from records by the loader's workers, and completed on the device."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.conditions import DropRates
from model.pixels import Size, clip_normalised, sides, unpacked_masks, vae_pixels
from model.spec import ModelSpec
from stages.regions import Mode
from train import draws
from train.buckets import Buckets
from train.packing import IMAGES, PackedBatch
from train.texts import text_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """A micro-batch of B samples on the device, with all random numbers that a step needs except
    the loss mask.

    keys: of the samples. references: keys of the samples that give their conditions, their own
    except in pairs.

    valid: (B,) bool, False for a blank sample in the place of one that can't be read.
    pixels: (B, 3, H, W) in [-1, 1], the images to learn.
    clip_images: (n, 3, S, S), the CLIP-normalised images that are not zero; image_rows: (n,)
    int64, their rows among 6·B, which are for each sample the photograph and its five regions.
    image_names, pixel_names: for each of clip_images and of pixels, a name that images of other
    content don't have; None for a blank sample's.
    moments: (B, 8, h, w), features of the images, and hidden: (n, tokens, V), those of the images
    for the image encoder; None where they aren't read. With them, the images have no pixels.
    texts, encoded_texts, text_rows: where the texts' states come from, see
    `train.texts.TextPlaces`. text_names: for each of encoded_texts, a name that other texts don't
    have.
    sizes: (B, 6) int64, SDXL's conditioning on sizes, see `model.pixels.size_condition`.
    latent_noise: (B, 4, h, w), for sampling the VAE's posterior; noise: (B, 4, h, w), the noise to
    predict; added_noise: (B, 4, h, w), what is added to the latents. timesteps: (B,) int64. The
    other fields are those of `model.conditions.ConditionBatch`.
    """

    position: int
    keys: tuple[str, ...]
    references: tuple[str, ...]
    valid: Tensor
    pixels: Tensor
    clip_images: Tensor
    image_rows: Tensor
    moments: Tensor | None
    hidden: Tensor | None
    texts: Tensor | None
    encoded_texts: Tensor
    text_rows: Tensor
    text_names: tuple[Hashable, ...]
    image_names: tuple[Hashable, ...]
    pixel_names: tuple[Hashable, ...]
    sizes: Tensor
    input_ids: Tensor
    input_ids_2: Tensor
    token_mask: Tensor
    token_idx: Tensor
    token_valid: Tensor
    region_masks: Tensor
    foreground: Tensor
    identity: Tensor
    latent_noise: Tensor
    noise: Tensor
    added_noise: Tensor
    timesteps: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """What turns records into micro-batches.

    resolution: side of the training images, in pixels, if they aren't in buckets. latent_channels,
    vae_factor: of the latents, and how many pixels' side one of theirs has. timesteps: number of
    the noise schedule's. noise_offset, input_perturbation: see configs.training.LossConfig.
    true_sizes: SDXL's conditioning on sizes is that of each sample. cache_size: number of prepared
    samples and pairs, the first ones read, that stay in memory, for small data sets with many
    epochs. verify: compare samples with their digests. prompt: the text in place of captions.
    """

    tokenizer: Any
    spec: ModelSpec
    mode: Mode
    resolution: int
    latent_channels: int
    vae_factor: int
    timesteps: int
    drop: DropRates
    seed: int
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    true_sizes: bool = True
    tokenizer_2: Any = None
    cache_size: int = 0
    verify: bool = True
    prompt: str | None = None
    buckets: Buckets | None = None

    def size(self, number: int) -> Size:
        """Returns width and height of a sample's training image, in pixels."""
        return sides(self.resolution) if self.buckets is None else self.buckets.size(number)


def unpacked(
    batch: PackedBatch, preparation: Preparation, device: torch.device | str
) -> TrainBatch:
    """Returns a packed micro-batch on the device, with its random numbers.

    Nothing is copied with a plain `to`, which would wait for all that the GPU still has to do.
    """
    positions = range(batch.position, batch.position + len(batch.keys))
    height, width = (side // preparation.vae_factor for side in batch.masks.shape[-2:])
    shape, seed = (preparation.latent_channels, height, width), preparation.seed
    normal = {
        name: torch.stack([draws.normal(shape, seed, name, position) for position in positions])
        for name in ("latent_noise", "noise")
    }
    if offset := preparation.noise_offset:
        channels = (shape[0], 1, 1)
        normal["noise"] = normal["noise"] + offset * torch.stack(
            [draws.normal(channels, seed, "noise_offset", position) for position in positions]
        )
    normal["added_noise"] = normal["noise"]
    if perturbation := preparation.input_perturbation:
        normal["added_noise"] = normal["noise"] + perturbation * torch.stack(
            [draws.normal(shape, seed, "perturbation", position) for position in positions]
        )
    timesteps = [
        draws.integer(preparation.timesteps, seed, "timestep", position) for position in positions
    ]
    pairs = [*zip(batch.keys, batch.references, strict=True)]
    places = [divmod(row, IMAGES) for row in batch.image_rows.tolist()]
    ids = text_ids(batch.input_ids, batch.input_ids_2)[batch.encoded_texts]
    moved = batch.to(device)
    region_masks, foreground = unpacked_masks(moved.masks)
    return TrainBatch(
        position=batch.position,
        keys=batch.keys,
        references=batch.references,
        valid=moved.valid,
        pixels=vae_pixels(moved.pixels),
        moments=moved.moments,
        hidden=moved.hidden,
        texts=moved.texts,
        encoded_texts=moved.encoded_texts,
        text_rows=moved.text_rows,
        text_names=tuple(each.numpy().tobytes() for each in ids),
        clip_images=clip_normalised(moved.clip_images),
        image_rows=moved.image_rows,
        image_names=tuple((pairs[sample], image) for sample, image in places),
        pixel_names=tuple(
            (key, *batch.masks.shape[-2:]) if valid else None
            for key, valid in zip(batch.keys, batch.valid.tolist(), strict=True)
        ),
        sizes=moved.sizes,
        input_ids=moved.input_ids,
        input_ids_2=moved.input_ids_2,
        token_mask=moved.token_mask,
        token_idx=moved.token_idx,
        token_valid=moved.token_valid,
        region_masks=region_masks,
        foreground=foreground,
        identity=moved.identity,
        timesteps=_moved(torch.tensor(timesteps, dtype=torch.int64), device),
        **{name: _moved(value, device) for name, value in normal.items()},
    )


def _moved(values: Tensor, device: torch.device | str) -> Tensor:
    """Returns the values on the device, without waiting for it."""
    pinned = values.pin_memory() if torch.device(device).type == "cuda" else values
    return pinned.to(device, non_blocking=True)
