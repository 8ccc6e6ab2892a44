"""Images and masks: as bytes, and as the models read them.

Conditions and micro-batches hold bytes, which are a quarter of float32; the device computes the
rest. A byte of a mask has a bit for each region slot and one for the foreground, so the soft edges
of scaled masks become hard.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stages.record import Record
from stages.regions import MAX_REGIONS, Mask, Mode

# of the images that CLIP was trained on: mean and standard deviation of red, green and blue
CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)
FOREGROUND: Final = MAX_REGIONS  # its bit in a mask's byte; a region's bit is its slot


def clip_image(image: Image.Image, side: int) -> Tensor:
    """Returns the image scaled and cropped for the image encoder, (3, side, side) uint8."""
    pixels: Tensor = _clip_processor(side)(
        images=image, do_rescale=False, do_normalize=False, return_tensors="pt"
    ).pixel_values[0]
    return pixels


@lru_cache(maxsize=8)
def _clip_processor(size: int) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )


def clip_normalised(images: Tensor) -> Tensor:
    """Returns what the image encoder reads of images (…, 3, S, S) uint8: float32, normalised."""
    mean, std = (
        torch.tensor(values).view(3, 1, 1).to(images.device, non_blocking=True)
        for values in (CLIP_MEAN, CLIP_STD)
    )
    return (images.float() / 255 - mean) / std


def training_image(record: Record, resolution: int) -> Tensor:
    """Returns the training image, (3, R, R) uint8.

    The short side is scaled to R and the centre is cropped, in the same way as for the masks.
    """
    with Image.open(io.BytesIO(record.image)) as file:
        image = _centre_crop(file.convert("RGB"), resolution)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def vae_pixels(images: Tensor) -> Tensor:
    """Returns what the VAE reads of images (…, 3, R, R) uint8: float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def training_pixels(record: Record, resolution: int) -> Tensor:
    """Returns the training image as the VAE reads it, (3, R, R) in [-1, 1]."""
    return vae_pixels(training_image(record, resolution))


def packed_masks(slots: Sequence[Mask], foreground: Mask, side: int) -> Tensor:
    """Returns the masks, cropped like the training image, (side, side) uint8."""
    bits = np.zeros((side, side), np.uint8)
    for bit, mask in [*enumerate(slots), (FOREGROUND, foreground)]:
        image = _centre_crop(Image.fromarray(mask.astype(np.uint8) * 255), side)
        bits |= (np.asarray(image) > 127).astype(np.uint8) << np.uint8(bit)
    return torch.from_numpy(bits)


def unpacked_masks(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the masks of the slots (…, 5, R, R) and of the foreground (…, R, R), 0 or 1, of
    packed ones (…, R, R).
    """
    bits = torch.arange(FOREGROUND + 1, dtype=torch.uint8, device=masks.device)
    unpacked = ((masks[..., None, :, :] >> bits.view(-1, 1, 1)) & 1).float()
    return unpacked[..., :FOREGROUND, :, :], unpacked[..., FOREGROUND, :, :]


def size_condition(record: Record, resolution: int, mode: Mode) -> Tensor:
    """Returns SDXL's conditioning on sizes for a record's training image, (6,) int64: height and
    width of the source's image, top and left of the crop in the scaled image, height and width of
    the crop (Podell et al. 2023, arXiv 2307.01952, section 2.2).

    In legacy mode the crop's corner is (0, 0), as in the reference. Where the source's size isn't
    known, the stored image's is taken.
    """
    _, (left, top) = _crop(record.width, record.height, resolution)
    corner = (0, 0) if mode == "legacy" else (top, left)
    source = record.source_height or record.height, record.source_width or record.width
    return torch.tensor([*source, *corner, resolution, resolution])


def _centre_crop(image: Image.Image, side: int) -> Image.Image:
    """Scales the short side to `side` pixels, then crops the centre square."""
    size, (left, top) = _crop(*image.size, side)
    resized = image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + side, top + side))


def _crop(width: int, height: int, side: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns width and height of the scaled image, and left and top of the centre square."""
    scale = side / min(width, height)
    size = max(side, round(width * scale)), max(side, round(height * scale))
    return size, ((size[0] - side) // 2, (size[1] - side) // 2)
