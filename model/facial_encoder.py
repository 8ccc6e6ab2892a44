"""The facial encoder: one token from each region's image, fused into the text token of its noun.

Attribute names are those of the published weights' keys. The reference overwrites its argument;
here the output is a new tensor. Slots are gathered and scattered by index, not by boolean masks,
whose result has a size that the host would have to read from the device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.projector import Resampler
from model.spec import ModelSpec


class RegionProjection(Resampler):
    """Hidden states of region images (B, N, V) → one token each (B, 1, C).

    A resampler with one learned latent.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(
            in_dim=spec.vision_dim,
            dim=spec.facial_dim,
            out_dim=spec.cross_attention_dim,
            depth=spec.facial_depth,
            heads=spec.facial_heads,
            dim_head=spec.dim_head,
        )
        self.latents = nn.Parameter(torch.randn(1, 1, spec.facial_dim) / spec.facial_dim**0.5)

    def project(self, hidden: Tensor) -> Tensor:
        return self(self.latents.expand(len(hidden), -1, -1), hidden)  # type: ignore[no-any-return]


class _MLP(nn.Module):
    def __init__(self, in_dim: int, dim: int, *, residual: bool) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(in_dim)
        self.fc1 = nn.Linear(in_dim, dim)
        self.fc2 = nn.Linear(dim, dim)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.fc2(F.gelu(self.fc1(self.layernorm(x))))
        return x + output if self.residual else output


class FuseModule(nn.Module):
    """Text tokens (…, C) and region tokens (…, C) → fused tokens (…, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp1 = _MLP(2 * dim, dim, residual=False)
        self.mlp2 = _MLP(dim, dim, residual=True)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, text: Tensor, region: Tensor) -> Tensor:
        mixed = self.mlp1(torch.cat((text, region), dim=-1)) + text
        fused: Tensor = self.layer_norm(self.mlp2(mixed))
        return fused


class FacialEncoder(nn.Module):
    """Fuses the hidden states of up to five region images into the marked tokens of a text."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.visual_projection = RegionProjection(spec)
        self.fuse_module = FuseModule(spec.cross_attention_dim)

    def forward(
        self,
        text_hidden: Tensor,
        region_hidden: Tensor,
        token_mask: Tensor,
        token_valid: Tensor,
        strength: Tensor | None = None,
    ) -> Tensor:
        """Returns the text states (B, 77, C) with the marked tokens replaced by fused ones.

        text_hidden: (B, 77, C). region_hidden: (B, R, N, V). token_mask: (B, 77) bool, the marked
        tokens. token_valid: (B, R) bool, the used slots; each row has as many True entries as the
        row of token_mask, and the n-th valid region is fused into the n-th marked token. strength:
        (B, R), interpolates between the text token (0) and the fused one (1) and extrapolates
        beyond; None: 1.
        """
        regions = self.region_tokens(region_hidden)
        return self.fuse(text_hidden, regions, token_mask, token_valid, strength)

    def region_tokens(self, region_hidden: Tensor) -> Tensor:
        """Hidden states of region images (B, R, N, V) → one token each (B, R, C)."""
        batch, slots = region_hidden.shape[:2]
        return self.visual_projection.project(region_hidden.flatten(0, 1)).reshape(batch, slots, -1)

    def fuse(
        self,
        text_hidden: Tensor,
        regions: Tensor,
        token_mask: Tensor,
        token_valid: Tensor,
        strength: Tensor | None = None,
    ) -> Tensor:
        """Does what `forward` does, from the regions' tokens (B, R, C)."""
        slots = regions.shape[1]
        # Stable sorts put the True entries first and in order. The other positions are distinct
        # too; they are read and written back unchanged.
        positions = torch.argsort(token_mask, dim=1, descending=True, stable=True)[:, :slots]
        order = torch.argsort(token_valid, dim=1, descending=True, stable=True)
        valid = token_valid.gather(1, order)[..., None]
        index = positions[..., None].expand(-1, -1, text_hidden.shape[-1])
        text = text_hidden.gather(1, index)
        fused = self.fuse_module(text, regions.gather(1, order[..., None].expand_as(regions)))
        if strength is not None:
            fused = torch.lerp(text, fused, strength.gather(1, order)[..., None].to(fused.dtype))
        return text_hidden.scatter(1, index, torch.where(valid, fused.to(text.dtype), text))


class NoFacialEncoder(nn.Module):
    """In the place of a FacialEncoder that the adapter lacks: texts stay as they are."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.width = spec.cross_attention_dim

    def region_tokens(self, region_hidden: Tensor) -> Tensor:
        """Hidden states of region images (B, R, N, V) → zeros (B, R, C)."""
        return region_hidden.new_zeros(*region_hidden.shape[:2], self.width)

    def fuse(self, text_hidden: Tensor, *_: Tensor | None) -> Tensor:
        return text_hidden


def facial_encoder(spec: ModelSpec) -> FacialEncoder | NoFacialEncoder:
    """Makes the facial encoder of a spec, or what takes its place."""
    return FacialEncoder(spec) if spec.has("facial_encoder") else NoFacialEncoder(spec)
