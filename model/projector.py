"""The ID projector: ID tokens from the identity embedding and the photograph; and its blocks.

Attribute names are those of the published weights' keys (IP-Adapter FaceID-Plus): `proj_in`,
`layers.0.0`, `to_kv`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.spec import ModelSpec
from stages.record import IDENTITY_DIM


class PerceiverAttention(nn.Module):
    """Multi-head attention of latents (B, L, D) over inputs (B, N, D) and themselves, no biases."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads = heads
        # Applied to queries and to keys, so that their product stays small in half precision.
        self.scale = dim_head**-0.25
        inner = heads * dim_head
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, inputs: Tensor, latents: Tensor) -> Tensor:
        inputs, latents = self.norm1(inputs), self.norm2(latents)
        query = self._heads(self.to_q(latents))
        key, value = map(
            self._heads, self.to_kv(torch.cat((inputs, latents), dim=1)).chunk(2, dim=-1)
        )
        scores = (query * self.scale) @ (key * self.scale).transpose(-1, -2)
        # In float32, as the published weights were trained: half precision loses small weights.
        attended = torch.softmax(scores.float(), dim=-1).type(scores.dtype) @ value
        output: Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return output

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.heads, -1).transpose(1, 2)


def feed_forward(dim: int, mult: int = 4) -> nn.Sequential:
    """Builds the feed-forward layers of a perceiver block: (…, dim) → (…, dim)."""
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, dim * mult, bias=False),
        nn.GELU(),
        nn.Linear(dim * mult, dim, bias=False),
    )


class Resampler(nn.Module):
    """Perceiver blocks between linear layers.

    Latents (B, L, dim) attend to inputs (B, N, in_dim); the output is (B, L, out_dim).
    """

    def __init__(
        self, *, in_dim: int, dim: int, out_dim: int, depth: int, heads: int, dim_head: int
    ) -> None:
        super().__init__()
        self.proj_in = nn.Linear(in_dim, dim)
        self.proj_out = nn.Linear(dim, out_dim)
        self.norm_out = nn.LayerNorm(out_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList((PerceiverAttention(dim, heads, dim_head), feed_forward(dim)))
            for _ in range(depth)
        )

    def forward(self, latents: Tensor, inputs: Tensor) -> Tensor:
        inputs = self.proj_in(inputs)
        for block in self.layers:
            attention, feed = block[0], block[1]  # type: ignore[index]
            latents = latents + attention(inputs, latents)
            latents = latents + feed(latents)
        output: Tensor = self.norm_out(self.proj_out(latents))
        return output


class IdentityProjector(nn.Module):
    """Identity (B, 512) and the photograph's hidden states (B, N, V) → ID tokens (B, T, C).

    `image_proj_model` in the published weights.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        dim = spec.cross_attention_dim
        self.num_tokens = spec.num_tokens
        self.proj = nn.Sequential(
            nn.Linear(IDENTITY_DIM, spec.identity_hidden),
            nn.GELU(),
            nn.Linear(spec.identity_hidden, dim * spec.num_tokens),
        )
        self.norm = nn.LayerNorm(dim)
        self.perceiver_resampler = Resampler(
            in_dim=spec.vision_dim,
            dim=dim,
            out_dim=dim,
            depth=spec.projector_depth,
            heads=spec.projector_heads,
            dim_head=spec.dim_head,
        )

    def forward(
        self, identity: Tensor, clip_hidden: Tensor, *, shortcut: bool, scale: float = 1.0
    ) -> Tensor:
        """Returns the ID tokens.

        With `shortcut` they are the projected identity plus `scale` times the resampler's output;
        without it they are the resampler's output alone, and `scale` has no effect.
        """
        tokens = self.norm(self.proj(identity).reshape(len(identity), self.num_tokens, -1))
        resampled: Tensor = self.perceiver_resampler(tokens, clip_hidden)
        return tokens + scale * resampled if shortcut else resampled


class NoProjector(nn.Module):
    """In the place of an IdentityProjector that the adapter lacks: ID tokens (B, T, C) of zeros."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.shape = (spec.num_tokens, spec.cross_attention_dim)

    def forward(
        self, identity: Tensor, clip_hidden: Tensor, *, shortcut: bool, scale: float = 1.0
    ) -> Tensor:
        return identity.new_zeros(len(identity), *self.shape)


def identity_projector(spec: ModelSpec) -> IdentityProjector | NoProjector:
    """Makes the ID projector of a spec, or what takes its place."""
    return IdentityProjector(spec) if spec.has("projector") else NoProjector(spec)
