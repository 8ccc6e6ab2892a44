"""Attention processors: LoRA on every attention, and a second cross-attention for the ID tokens.

All layers use PyTorch's fused attention, which returns no attention scores. The localisation loss
needs scores, so the trainer passes a `RegionScores` through diffusers' `cross_attention_kwargs`.
Hooked layers compute the scores of the region tokens a second time and store them there.

The processors define `__call__`, not `forward`: diffusers reads its signature to decide which
arguments to pass.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.spec import ModelSpec
from stages.regions import Mode


class RegionScores:
    """Collects the attention probabilities of region tokens from the hooked layers of a UNet.

    token_idx: (B, R) int64, positions of the region tokens. After the UNet's forward pass `scores`
    has one tensor for each hooked layer: probabilities (B, heads, pixels, R) with gradients. Make
    a new object for each forward pass.
    """

    def __init__(self, token_idx: Tensor) -> None:
        self.token_idx = token_idx
        self._by_layer: dict[str, Tensor] = {}

    @property
    def scores(self) -> list[Tensor]:
        return list(self._by_layer.values())

    def add(self, layer: str, query: Tensor, key: Tensor) -> None:
        """Stores the probabilities of a layer. query: (B, heads, N, d), key: (B, heads, T, d).

        With gradient checkpointing a layer runs twice and must do the same both times, so the
        probabilities are computed in both runs and only those of the first run are stored.
        """
        probabilities = token_probabilities(query, key, self.token_idx)
        self._by_layer.setdefault(layer, probabilities)


def token_probabilities(query: Tensor, key: Tensor, token_idx: Tensor) -> Tensor:
    """Returns softmax(q·k/√d) over all T keys, at the keys token_idx only.

    query: (B, heads, N, d); key: (B, heads, T, d); token_idx: (B, R). Returns (B, heads, N, R)
    float32. The probability is zero for an index ≥ T: in legacy mode, as in the reference, text
    positions index the keys of self-attention, which are pixels, and an 8×8 layer has only 64.
    """
    logits = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    index = token_idx.clamp(max=key.shape[-2] - 1)[:, None, None, :].expand(*logits.shape[:-1], -1)
    probabilities = torch.exp(
        logits.gather(-1, index) - torch.logsumexp(logits, dim=-1, keepdim=True)
    )
    return probabilities * (token_idx < key.shape[-2])[:, None, None, :]


class LoRALinear(nn.Module):
    """The low-rank update of a linear layer: (…, in_dim) → (…, out_dim). It starts at zero."""

    def __init__(self, in_dim: int, out_dim: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(in_dim, rank, bias=False)
        self.up = nn.Linear(rank, out_dim, bias=False)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = self.up(self.down(x.to(self.down.weight.dtype)))
        return update.to(x.dtype)

    def delta(self) -> Tensor:
        """Returns the update as a weight matrix (out_dim, in_dim)."""
        return self.up.weight @ self.down.weight


class LoRASelfAttention(nn.Module):
    """Processor of attn1: self-attention with LoRA on the q, k, v and output projections.

    hook: the layer's name if the localisation loss reads its scores, else "".
    """

    def __init__(self, hidden: int, context: int, rank: int, hook: str = "") -> None:
        super().__init__()
        self.hook = hook
        self.merged = False
        self.to_q_lora = LoRALinear(hidden, hidden, rank)
        self.to_k_lora = LoRALinear(context, hidden, rank)
        self.to_v_lora = LoRALinear(context, hidden, rank)
        self.to_out_lora = LoRALinear(hidden, hidden, rank)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        region_scores: RegionScores | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = self._heads(attn, self._linear(attn.to_q, self.to_q_lora, hidden_states))
        attended = self._attend(attn, query, context, attention_mask, region_scores)
        joined = attended.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        out = attn.to_out[1](self._linear(attn.to_out[0], self.to_out_lora, joined))
        if attn.residual_connection:
            out = out + hidden_states
        return cast(Tensor, out / attn.rescale_output_factor)

    def _attend(
        self,
        attn: Any,
        query: Tensor,
        context: Tensor,
        mask: Tensor | None,
        region_scores: RegionScores | None,
    ) -> Tensor:
        if mask is not None:
            raise ValueError(
                "an attention mask was passed, but ConsistentID attends to all tokens; pass none"
            )
        key = self._heads(attn, self._linear(attn.to_k, self.to_k_lora, context))
        value = self._heads(attn, self._linear(attn.to_v, self.to_v_lora, context))
        if region_scores is not None and self.hook:
            region_scores.add(self.hook, query, key)
        return F.scaled_dot_product_attention(query, key, value)

    def _linear(self, linear: nn.Module, lora: LoRALinear, x: Tensor) -> Tensor:
        base: Tensor = linear(x)
        return base if self.merged else base + lora(x)

    @staticmethod
    def _heads(attn: Any, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], attn.heads, -1).transpose(1, 2)

    @torch.no_grad()
    def merge(self, attn: Any) -> None:
        """Adds the LoRA to the attention's own weights, for fewer products per step.

        This can't be undone; a second call does nothing.
        """
        if self.merged:
            return
        for linear, lora in (
            (attn.to_q, self.to_q_lora),
            (attn.to_k, self.to_k_lora),
            (attn.to_v, self.to_v_lora),
            (attn.to_out[0], self.to_out_lora),
        ):
            linear.weight += lora.delta().to(linear.weight)
        self.merged = True


class IdentityCrossAttention(LoRASelfAttention):
    """Processor of attn2: attention over the text plus `scale` times attention over the ID tokens.

    The last `num_tokens` tokens of the context are the ID tokens. With scale 0 only the text is
    attended to.
    """

    def __init__(
        self, hidden: int, context: int, rank: int, num_tokens: int, hook: str = ""
    ) -> None:
        super().__init__(hidden, context, rank, hook)
        self.num_tokens = num_tokens
        self.scale = 1.0
        self.to_k_ip = nn.Linear(context, hidden, bias=False)
        self.to_v_ip = nn.Linear(context, hidden, bias=False)

    def _attend(
        self,
        attn: Any,
        query: Tensor,
        context: Tensor,
        mask: Tensor | None,
        region_scores: RegionScores | None,
    ) -> Tensor:
        text, identity = context[:, : -self.num_tokens], context[:, -self.num_tokens :]
        attended = super()._attend(attn, query, text, mask, region_scores)
        if self.scale == 0.0:
            return attended
        identity = identity.to(self.to_k_ip.weight.dtype)
        key = self._heads(attn, self.to_k_ip(identity)).to(query.dtype)
        value = self._heads(attn, self.to_v_ip(identity)).to(query.dtype)
        return attended + self.scale * F.scaled_dot_product_attention(query, key, value)


def install_processors(unet: Any, spec: ModelSpec, mode: Mode) -> nn.ModuleList:
    """Puts new processors into a UNet and returns them.

    Their order is diffusers': blocks down, up, mid; even positions are attn1, odd ones attn2. The
    ID attention starts with the weights of the text's attention. In the blocks of `spec.hooked`
    the cross-attentions are hooked for the localisation loss (legacy: the self-attentions, as in
    the reference).
    """
    hooked_kind = "attn2" if mode == "corrected" else "attn1"
    processors: dict[str, LoRASelfAttention] = {}
    for name in unet.attn_processors:
        path = name.removesuffix(".processor")
        attn = unet.get_submodule(path)
        hidden, context = attn.to_q.out_features, attn.to_k.in_features
        hooked = path.endswith(hooked_kind) and path.startswith(
            tuple(f"{block}." for block in spec.hooked)
        )
        hook = path if hooked else ""
        if path.endswith("attn1"):
            processors[name] = LoRASelfAttention(hidden, context, spec.lora_rank, hook)
            continue
        cross = IdentityCrossAttention(hidden, context, spec.lora_rank, spec.num_tokens, hook)
        with torch.no_grad():
            cross.to_k_ip.weight.copy_(attn.to_k.weight)
            cross.to_v_ip.weight.copy_(attn.to_v.weight)
        processors[name] = cross
    unet.set_attn_processor(dict(processors))  # a copy, because diffusers empties its argument
    return nn.ModuleList(processors.values())


def merge_lora(unet: Any) -> None:
    """Merges every processor's LoRA into the UNet's weights, for faster inference.

    This can't be undone.
    """
    for name, processor in unet.attn_processors.items():
        if isinstance(processor, LoRASelfAttention):
            processor.merge(unet.get_submodule(name.removesuffix(".processor")))
