"""Losses: predicted noise, and where in the picture the region tokens' attention lies."""

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
    """Mean squared error in float32 of (B, C, h, w), over all elements.

    mask: (B, H, W) in [0, 1], resized to the latents and multiplied into both; masked-out elements
    still count in the mean, as in the reference. weights: (B,), per sample (min-SNR).
    """
    prediction, target = prediction.float(), target.float()
    if mask is not None:
        small = F.interpolate(mask[:, None].float(), size=prediction.shape[-2:], mode="bilinear")
        prediction, target = prediction * small, target * small
    error = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
    return (error if weights is None else error * weights).mean()


def localisation_loss(scores: Sequence[Tensor], region_masks: Tensor, valid: Tensor) -> Tensor:
    """Balanced L1 (REFERENCE.md 6.3): a region token's attention should lie inside the region's
    mask.

    scores: per hooked layer (B, heads, pixels, R), probabilities of the region tokens.
    region_masks: (B, R, H, W) in [0, 1]. valid: (B, R) bool. The layers' mean; ValueError without a
    layer.
    """
    if not scores:
        raise ValueError(
            "no layer gave scores: pass RegionScores to the UNet, with spec.hooked naming blocks "
            "it has"
        )
    return torch.stack([_layer_loss(layer, region_masks, valid) for layer in scores]).mean()


def _layer_loss(scores: Tensor, region_masks: Tensor, valid: Tensor) -> Tensor:
    scores = scores.float()
    height, width = region_masks.shape[-2:]
    rows = round((scores.shape[2] * height / width) ** 0.5)
    size = (rows, scores.shape[2] // rows)
    if size[0] * size[1] != scores.shape[2]:
        raise ValueError(
            f"{scores.shape[2]} pixels of attention don't make a picture of {height}×{width}'s "
            "shape"
        )
    masks = F.interpolate(region_masks.float(), size=size, mode="bilinear", antialias=True)
    inside = masks.flatten(2).transpose(1, 2)[:, None]  # (B, 1, pixels, R)
    outside = 1.0 - inside
    scores = scores / (scores.amax(dim=2, keepdim=True) + _EPSILON)
    spilt = (scores * outside).sum(2) / (outside.sum(2) + _EPSILON)
    held = (scores * inside).sum(2) / (inside.sum(2) + _EPSILON)
    valid = valid[:, None].to(scores.dtype)
    per_head = ((spilt - held) * valid).sum(-1) / (valid.sum(-1) + _EPSILON)
    return per_head.mean()
