"""Training losses: the noise loss, and the localisation loss on the region tokens' attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

_EPSILON: Final = 1e-5


def noise_loss(
    prediction: Tensor, target: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Returns the mean of `noise_errors` over the samples."""
    return noise_errors(prediction, target, mask, weights).mean()


def noise_errors(
    prediction: Tensor, target: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Returns each sample's mean squared error of two tensors (B, C, h, w), (B,) float32.

    mask: (B, H, W) in [0, 1], resized to the latents and multiplied into both; as in the
    reference, masked-out elements count as zero error in the mean. weights: (B,), per sample
    (min-SNR).
    """
    prediction, target = prediction.float(), target.float()
    if mask is not None:
        small = F.interpolate(mask[:, None].float(), size=prediction.shape[-2:], mode="bilinear")
        prediction, target = prediction * small, target * small
    error = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
    return error if weights is None else error * weights


def localisation_loss(scores: Sequence[Tensor], region_masks: Tensor, valid: Tensor) -> Tensor:
    """Returns the mean of `localisation_errors` over the samples."""
    return localisation_errors(scores, region_masks, valid).mean()


def localisation_errors(scores: Sequence[Tensor], region_masks: Tensor, valid: Tensor) -> Tensor:
    """Returns each sample's balanced L1 loss, which pulls a region token's attention into the
    region's mask, (B,).

    It is the reference's loss (BalancedL1): the mean normalised attention outside of the mask
    minus the mean inside it, averaged over valid regions, heads and layers; in [-1, 1].

    scores: for each hooked layer (B, heads, pixels, R), the region tokens' probabilities.
    region_masks: (B, R, H, W) in [0, 1]. valid: (B, R) bool. Raises ValueError without a layer, or
    if a layer's pixels don't form an image with the masks' aspect ratio.
    """
    if not scores:
        raise ValueError(
            "no layer returned scores: pass token_idx to the UNet call, and name in spec.hooked "
            "blocks that the UNet has"
        )
    by_size: dict[tuple[int, int], list[Tensor]] = {}
    for layer in scores:
        by_size.setdefault((layer.shape[1], layer.shape[2]), []).append(layer)
    # layers of one size in one computation, for fewer operations: their heads follow each other
    per_head = [
        _head_errors(torch.cat(layers, 1), region_masks, valid).reshape(len(valid), len(layers), -1)
        for layers in by_size.values()
    ]
    return torch.cat([errors.mean(2) for errors in per_head], 1).mean(1)


def layer_size(region_masks: Tensor, pixels: int) -> tuple[int, int]:
    """Returns height and width of a layer's attention that has this number of pixels.

    Raises ValueError if they don't form an image with the aspect ratio of the masks (…, H, W).
    """
    height, width = region_masks.shape[-2:]
    rows = round((pixels * height / width) ** 0.5)
    size = (rows, pixels // rows)
    if size[0] * size[1] != pixels:
        raise ValueError(
            f"{pixels} pixels of attention don't form an image with the aspect ratio of "
            f"the {height}×{width} masks; pass the masks at the training resolution"
        )
    return size


def _head_errors(scores: Tensor, region_masks: Tensor, valid: Tensor) -> Tensor:
    """Returns the loss of each head, (B, heads), from scores (B, heads, pixels, R)."""
    scores = scores.float()
    size = layer_size(region_masks, scores.shape[2])
    masks = F.interpolate(region_masks.float(), size=size, mode="bilinear", antialias=True)
    inside = masks.flatten(2).transpose(1, 2)[:, None]  # (B, 1, pixels, R)
    outside = 1.0 - inside
    scores = scores / (scores.amax(dim=2, keepdim=True) + _EPSILON)
    mean_outside = (scores * outside).sum(2) / (outside.sum(2) + _EPSILON)
    mean_inside = (scores * inside).sum(2) / (inside.sum(2) + _EPSILON)
    valid = valid[:, None].to(scores.dtype)
    return ((mean_outside - mean_inside) * valid).sum(-1) / (valid.sum(-1) + _EPSILON)
