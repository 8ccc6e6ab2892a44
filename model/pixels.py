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
Size = tuple[int, int]  # width and height, in pixels
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


def sides(resolution: int | Size) -> Size:
    """Returns width and height. resolution: these, or the side of a square."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def training_image(record: Record, resolution: int | Size) -> Tensor:
    """Returns the training image, (3, H, W) uint8. resolution: see `sides`.

    It is scaled to cover that size and the centre is cropped, in the same way as for the masks.
    """
    with Image.open(io.BytesIO(record.image)) as file:
        image = _centre_crop(file.convert("RGB"), resolution)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def vae_pixels(images: Tensor) -> Tensor:
    """Returns what the VAE reads of images (…, 3, H, W) uint8: float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def training_pixels(record: Record, resolution: int | Size) -> Tensor:
    """Returns the training image as the VAE reads it, (3, H, W) in [-1, 1]."""
    return vae_pixels(training_image(record, resolution))


def packed_masks(slots: Sequence[Mask], foreground: Mask, resolution: int | Size) -> Tensor:
    """Returns the masks, cropped like the training image, (H, W) uint8."""
    width, height = sides(resolution)
    bits = np.zeros((height, width), np.uint8)
    for bit, mask in [*enumerate(slots), (FOREGROUND, foreground)]:
        image = _centre_crop(Image.fromarray(mask.astype(np.uint8) * 255), resolution)
        bits |= (np.asarray(image) > 127).astype(np.uint8) << np.uint8(bit)
    return torch.from_numpy(bits)


def unpacked_masks(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the masks of the slots (…, 5, H, W) and of the foreground (…, H, W), 0 or 1, of
    packed ones (…, H, W).
    """
    bits = torch.arange(FOREGROUND + 1, dtype=torch.uint8, device=masks.device)
    unpacked = ((masks[..., None, :, :] >> bits.view(-1, 1, 1)) & 1).float()
    return unpacked[..., :FOREGROUND, :, :], unpacked[..., FOREGROUND, :, :]


def size_condition(record: Record, resolution: int | Size, mode: Mode) -> Tensor:
    """Returns SDXL's conditioning on sizes for a record's training image, (6,) int64: height and
    width of the source's image, top and left of the crop in the scaled image, height and width of
    the crop (Podell et al. 2023, arXiv 2307.01952, section 2.2).

    In legacy mode the crop's corner is (0, 0), as in the reference. Where the source's size isn't
    known, the stored image's is taken.
    """
    _, (left, top) = _crop(record.width, record.height, resolution)
    corner = (0, 0) if mode == "legacy" else (top, left)
    source = record.source_height or record.height, record.source_width or record.width
    width, height = sides(resolution)
    return torch.tensor([*source, *corner, height, width])


def fixed_size_condition(resolution: int | Size) -> Tensor:
    """Returns SDXL's conditioning on sizes for an image that isn't cropped, (6,) int64."""
    width, height = sides(resolution)
    return torch.tensor([height, width, 0, 0, height, width])


def _centre_crop(image: Image.Image, resolution: int | Size) -> Image.Image:
    """Scales the image until it covers a size, then crops the centre."""
    size, (left, top) = _crop(*image.size, resolution)
    width, height = sides(resolution)
    resized = image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + width, top + height))


def _crop(width: int, height: int, resolution: int | Size) -> tuple[Size, tuple[int, int]]:
    """Returns width and height of the scaled image, and left and top of its centre."""
    across, down = sides(resolution)
    scale = max(across / width, down / height)
    size = max(across, round(width * scale)), max(down, round(height * scale))
    return size, ((size[0] - across) // 2, (size[1] - down) // 2)
