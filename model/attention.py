"""Attention processors: LoRA on every attention, and a second cross-attention for the ID tokens.

All layers use PyTorch's fused attention, which returns no attention scores. The localisation loss
needs scores, so the trainer passes a `RegionScores` through diffusers' `cross_attention_kwargs`.
Hooked layers compute the scores of the region tokens a second time and store them there.

The processors define `__call__`, not `forward`: diffusers reads its signature to decide which
arguments to pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.errors import WeightsError
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

    @torch.compiler.disable  # type: ignore[untyped-decorator] # forward and recomputation must agree
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
    query = query * query.shape[-1] ** -0.5
    # A second product with the chosen keys is cheaper than choosing from the logits: backward, that
    # would be a scatter into all of them.
    index = token_idx.clamp(max=key.shape[-2] - 1)[:, None, :, None]
    chosen = key.gather(-2, index.expand(-1, key.shape[1], -1, key.shape[-1]))
    total = torch.logsumexp((query @ key.transpose(-1, -2)).float(), dim=-1, keepdim=True)
    probabilities = torch.exp((query @ chosen.transpose(-1, -2)).float() - total)
    return probabilities * (token_idx < key.shape[-2])[:, None, None, :]


def linear_of(x: Tensor, linear: nn.Linear) -> Tensor:
    """Returns the linear layer of `x` in the type of `x`: in a UNet in half precision, the
    adapter's float32 weights are rounded for the product, and their gradients are float32.
    """
    if linear.weight.dtype == x.dtype:
        output: Tensor = linear(x)  # as a module: hooks of an offloaded model load its weight
        return output
    return F.linear(x, linear.weight.to(x.dtype))


class LoRALinear(nn.Module):
    """The low-rank update of a linear layer: (…, in_dim) → (…, out_dim). It starts at zero."""

    def __init__(self, in_dim: int, out_dim: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(in_dim, rank, bias=False)
        self.up = nn.Linear(rank, out_dim, bias=False)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return linear_of(linear_of(x, self.down), self.up)

    def added_to(self, weight: Tensor) -> Tensor:
        """Returns `weight` (out_dim, in_dim) plus the update, in the type of `weight`.

        The sum is computed in float32: in half precision the product alone is wrong by percents.
        """
        delta = self.up.weight.float() @ self.down.weight.float()
        return (weight.float() + delta.to(weight.device)).to(weight.dtype)


def _lora(spec: ModelSpec, in_dim: int, out_dim: int) -> LoRALinear | None:
    return LoRALinear(in_dim, out_dim, spec.lora_rank) if spec.has("lora") else None


class LoRASelfAttention(nn.Module):
    """Processor of attn1: self-attention with LoRA on the q, k, v and output projections.

    hidden, context: width of the queries and of the tokens that are attended to. hook: the layer's
    name if the localisation loss reads its scores, else "".
    """

    def __init__(self, hidden: int, context: int, spec: ModelSpec, hook: str = "") -> None:
        super().__init__()
        self.hook = hook
        # While the LoRA is merged: the attention's own weights, on the CPU.
        self._unmerged: list[Tensor] = []
        self.to_q_lora = _lora(spec, hidden, hidden)
        self.to_k_lora = _lora(spec, context, hidden)
        self.to_v_lora = _lora(spec, context, hidden)
        self.to_out_lora = _lora(spec, hidden, hidden)

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

    @property
    def merged(self) -> bool:
        return bool(self._unmerged)

    def _linear(self, linear: nn.Module, lora: LoRALinear | None, x: Tensor) -> Tensor:
        base: Tensor = linear(x)
        return base if lora is None or self._unmerged else base + lora(x)

    @staticmethod
    def _heads(attn: Any, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], attn.heads, -1).transpose(1, 2)

    def _updates(self, attn: Any) -> list[tuple[nn.Parameter, LoRALinear]]:
        """Returns the attention's own weights, each with its LoRA. A LoRA of peft wraps a layer."""
        linears = (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])
        loras = (self.to_q_lora, self.to_k_lora, self.to_v_lora, self.to_out_lora)
        return [
            (linear.get_base_layer().weight if hasattr(linear, "get_base_layer") else linear.weight,
             lora)
            for linear, lora in zip(linears, loras, strict=True)
            if lora is not None
        ]  # fmt: skip

    @torch.no_grad()
    def merge(self, attn: Any) -> None:
        """Adds the LoRA to the attention's own weights, for fewer products per step.

        A copy of the weights stays on the CPU for `unmerge`. A second call does nothing. Raises
        WeightsError if the weights are offloaded.
        """
        if self._unmerged:
            return
        updates = self._updates(attn)
        if any(weight.is_meta or lora.up.weight.is_meta for weight, lora in updates):
            raise WeightsError(
                "the UNet's weights are offloaded, so the adapter can't be merged into them; merge "
                "before offloading"
            )
        self._unmerged = [weight.detach().to("cpu", copy=True) for weight, _ in updates]
        for weight, lora in updates:
            weight.copy_(lora.added_to(weight))

    @torch.no_grad()
    def unmerge(self, attn: Any) -> None:
        """Restores the weights from before `merge`, bit for bit; without a merge it does nothing.

        Raises WeightsError if something else has changed the weights since: restoring them would
        undo that as well.
        """
        if not self._unmerged:
            return
        updates = self._updates(attn)
        for (weight, lora), before in zip(updates, self._unmerged, strict=True):
            expected = lora.added_to(before.to(weight.device))
            rounding = 2 * torch.finfo(weight.dtype).eps
            if not torch.allclose(weight.float(), expected.float(), rtol=rounding, atol=1e-6):
                raise WeightsError(
                    "the UNet's attention weights were changed after the adapter was merged into "
                    "them, for example by fuse_lora; undo that first"
                )
        for (weight, _), before in zip(updates, self._unmerged, strict=True):
            weight.copy_(before)
        self._unmerged = []


class IdentityCrossAttention(LoRASelfAttention):
    """Processor of attn2: attention over the text plus `scale` times attention over the ID tokens.

    The last `num_tokens` tokens of the context are the ID tokens. With scale 0, and for a spec
    without projector, only the text is attended to: of tokens that are zero, the values are too.
    """

    def __init__(self, hidden: int, context: int, spec: ModelSpec, hook: str = "") -> None:
        super().__init__(hidden, context, spec, hook)
        self.num_tokens = spec.num_tokens
        self.scale = 1.0
        has_identity = spec.has("projector")
        self.to_k_ip = nn.Linear(context, hidden, bias=False) if has_identity else None
        self.to_v_ip = nn.Linear(context, hidden, bias=False) if has_identity else None

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
        if self.scale == 0.0 or self.to_k_ip is None or self.to_v_ip is None:
            return attended
        key = self._heads(attn, linear_of(identity, self.to_k_ip))
        value = self._heads(attn, linear_of(identity, self.to_v_ip))
        return attended + self.scale * F.scaled_dot_product_attention(query, key, value)


def install_processors(unet: Any, spec: ModelSpec, mode: Mode) -> nn.ModuleList:
    """Puts new processors into a UNet and returns them.

    Their order is diffusers': blocks down, up, mid; even positions are attn1, odd ones attn2. The
    ID attention starts with the weights of the text's attention. In the blocks of `spec.hooked`
    the cross-attentions are hooked for the localisation loss (legacy: the self-attentions, as in
    the reference). Raises WeightsError if another adapter is merged into the UNet's weights.
    """
    if any(processor.merged for _, processor in _adapted(unet)):
        raise WeightsError(
            "another adapter is merged into the UNet's weights; undo that first (unmerge_lora)"
        )
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
            processors[name] = LoRASelfAttention(hidden, context, spec, hook)
            continue
        processors[name] = cross = IdentityCrossAttention(hidden, context, spec, hook)
        if cross.to_k_ip is not None and cross.to_v_ip is not None:
            with torch.no_grad():
                cross.to_k_ip.weight.copy_(attn.to_k.weight)
                cross.to_v_ip.weight.copy_(attn.to_v.weight)
    unet.set_attn_processor(dict(processors))  # a copy, because diffusers empties its argument
    return nn.ModuleList(processors.values())


def merge_lora(unet: Any) -> None:
    """Merges every processor's LoRA into the UNet's weights, for faster inference."""
    for attn, processor in _adapted(unet):
        processor.merge(attn)


def unmerge_lora(unet: Any) -> None:
    """Restores the weights from before `merge_lora`, bit for bit."""
    for attn, processor in _adapted(unet):
        processor.unmerge(attn)


def _adapted(unet: Any) -> Iterator[tuple[Any, LoRASelfAttention]]:
    """Yields the attentions that have a processor of the adapter, each with its processor."""
    for module in unet.modules():
        processor = getattr(module, "processor", None)
        if isinstance(processor, LoRASelfAttention):
            yield module, processor
