"""Conditioning: from people and prompts to the states that the UNet's cross-attention reads.

The denoising steps have two phases. In the first the UNet is conditioned on the text and the ID
tokens, which determine the composition; in the second on the text with fused regions and the ID
tokens. Row n of every tensor belongs to prompt n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infer.identity import Identity
from model.consistentid import ConsistentID, HasTextEncoders, encode_text
from model.prompt import inference_text, tokenize_marked, without_marks
from model.tokens import SECOND_PAD, TextTokens, text_tokens
from stages.regions import MAX_REGIONS, word_of

Ids = tuple[Tensor, Tensor]  # of a text, (77,) each, for the first and the second text encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class PersonTokens:
    """What an adapter makes of an identity, on the device; C is the width of a text token.

    identity: (4, C), the ID tokens. regions: a token (C,) for each region. no_identity (4, C),
    no_region (C,): those of a zero embedding and zero pixels, for the unconditional branch.
    """

    identity: Tensor
    regions: Mapping[str, Tensor]
    no_identity: Tensor
    no_region: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TextStates:
    """States of B texts. hidden: (B, 77, C). pooled: (B, P), None with one text encoder."""

    hidden: Tensor
    pooled: Tensor | None = None

    def rows(self, index: Sequence[int]) -> TextStates:
        pooled = None if self.pooled is None else self.pooled[list(index)]
        return TextStates(hidden=self.hidden[list(index)], pooled=pooled)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """The UNet's `encoder_hidden_states`, (B, 77 + 4, C) each.

    early, late: of the two phases. negative: of the unconditional branch, in both. The pooled
    states, (B, P), are those of SDXL.
    """

    early: Tensor
    late: Tensor
    negative: Tensor
    pooled_early: Tensor | None = None
    pooled_late: Tensor | None = None
    pooled_negative: Tensor | None = None


@torch.no_grad()
def person_tokens(model: ConsistentID, identity: Identity, device: torch.device) -> PersonTokens:
    """Runs the adapter's projector and facial encoder, which are on `device`, on an identity."""
    embedding = identity.embedding
    ids = model.encode_identity(
        torch.stack((embedding, torch.zeros_like(embedding))).to(device),
        torch.stack((identity.clip_hidden, identity.zero_hidden)).to(device),
    )
    hidden = torch.cat((identity.region_hidden, identity.zero_hidden[None])).to(device)
    regions = model.region_tokens(hidden[None])[0]
    return PersonTokens(
        identity=ids[0],
        regions=dict(zip(identity.regions, regions[:-1], strict=True)),
        no_identity=ids[1],
        no_region=regions[-1],
    )


def prompt_tokens(
    model: ConsistentID,
    identity: Identity,
    prompt: str,
    face_caption: str,
    tokenizer: Any,
    tokenizer_2: Any = None,
) -> TextTokens:
    """Puts the facial description behind a prompt, marks it and tokenizes it.

    tokenizer: with the marks added (`model.prompt.add_marks`). tokenizer_2: SDXL's.
    """
    marked = inference_text(
        prompt, face_caption, identity.regions, tokenizer, model.spec, model.mode
    )
    return text_tokens(marked, tokenizer, model.mode, tokenizer_2)


def plain_ids(text: str, tokenizer: Any, text_2: str | None = None) -> Ids:
    """Tokenizes a text without facial description, cut with an EOS. text_2: another one for the
    second text encoder.
    """
    first, second = (
        torch.tensor(tokenize_marked(each, tokenizer, keep_eos=True, pad_id=pad).ids)
        for each, pad in ((text, None), (text if text_2 is None else text_2, SECOND_PAD))
    )
    return first, second


def early_ids(
    model: ConsistentID, tokens: TextTokens, prompt: str, prompt_2: str | None, tokenizer: Any
) -> Ids:
    """Returns the ids of the text that the first phase reads. prompt_2: another prompt for the
    second text encoder.

    corrected: those of the second phase. legacy: those of the same text, cut with an EOS; with two
    text encoders, of the prompt alone (as in the reference's pipelines for SD1.5 and SDXL).
    """
    if model.mode == "corrected":
        return tokens.input_ids, tokens.input_ids_2
    if model.spec.two_text_encoders:
        return plain_ids(prompt, tokenizer, prompt_2)
    return plain_ids(without_marks(tokens.text), tokenizer)


@torch.no_grad()
def text_states(
    encoders: HasTextEncoders,
    texts: Sequence[Ids],
    device: torch.device,
    clip_skip: int | None = None,
) -> TextStates:
    """Encodes texts, equal ones once, and each by itself: in a batch, the last bits of a text's
    states would depend on the other texts.
    """
    keys = [(tuple(first.tolist()), tuple(second.tolist())) for first, second in texts]
    unique = {}
    for key in dict.fromkeys(keys):
        first, second = (torch.tensor([ids], device=device) for ids in key)
        unique[key] = encode_text(encoders, first, second, clip_skip)
    hidden = torch.cat([unique[key][0] for key in keys])
    pooled = [states for key in keys if (states := unique[key][1]) is not None]
    return TextStates(hidden=hidden, pooled=torch.cat(pooled) if pooled else None)


@torch.no_grad()
def guidance_states(
    model: ConsistentID,
    people: Sequence[PersonTokens],
    tokens: Sequence[TextTokens],
    *,
    early: TextStates,
    late: TextStates,
    negative: TextStates,
    strength: Mapping[str, float] | None = None,
) -> Guidance:
    """Computes the UNet's conditioning for both phases and for the unconditional branch.

    tokens: of the second phase's texts; late: their states before regions are fused. strength: of a
    region's word, see `FacialEncoder.forward`; 1 where it has none. Legacy mode fuses zero-pixel
    regions into the negative text at the positions of the positive text's nouns, as the published
    weights expect (reference: the SD1.5 pipeline's call).
    """
    device = late.hidden.device
    mask, valid = (
        torch.stack([getattr(each, name) for each in tokens]).to(device)
        for name in ("token_mask", "token_valid")
    )
    regions = torch.stack([_slots(*pair) for pair in zip(people, tokens, strict=True)])
    weights = None
    if strength and any(value != 1 for value in strength.values()):
        weights = torch.stack([_strengths(each, strength) for each in tokens]).to(device)
    late_text = model.fuse(late.hidden, regions, mask, valid, weights)
    negative_text = negative.hidden
    if model.mode == "legacy":
        empty = torch.stack([person.no_region.expand(MAX_REGIONS, -1) for person in people])
        negative_text = model.fuse(negative_text, empty, mask, valid)
    identity = torch.stack([person.identity for person in people])
    no_identity = torch.stack([person.no_identity for person in people])

    def joined(text: Tensor, ids: Tensor) -> Tensor:
        return torch.cat((text.to(late_text.dtype), ids.to(late_text.dtype)), dim=1)

    return Guidance(
        early=joined(early.hidden, identity),
        late=joined(late_text, identity),
        negative=joined(negative_text, no_identity),
        pooled_early=early.pooled,
        pooled_late=late.pooled,
        pooled_negative=negative.pooled,
    )


def _slots(person: PersonTokens, tokens: TextTokens) -> Tensor:
    """Returns the tokens of the regions in a text's slots, (5, C); those of unused slots are the
    zero image's.
    """
    used = [person.regions[region] for region in tokens.regions]
    return torch.stack([*used, *[person.no_region] * (MAX_REGIONS - len(used))])


def _strengths(tokens: TextTokens, strength: Mapping[str, float]) -> Tensor:
    values = [strength.get(word_of(region), 1.0) for region in tokens.regions]
    return torch.tensor([*values, *[1.0] * (MAX_REGIONS - len(values))])
