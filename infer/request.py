"""A call of a pipeline: from its arguments and people to the UNet's conditioning."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import torch
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor

from configs.errors import ConfigError
from infer.adapter import Adapter
from infer.components import load_image_encoder
from infer.conditioning import (
    Guidance,
    TextStates,
    early_ids,
    guidance_states,
    plain_ids,
    prompt_tokens,
)
from infer.description import describe
from infer.identity import Identity, encode_photo, joined
from infer.notices import prompt_notices
from infer.photo import Photo, as_record, shown_name
from model.consistentid import encode_images
from model.tokens import TextTokens

logger = logging.getLogger("consistentid")

_TEXTS: Final = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")


@dataclass(frozen=True, slots=True)
class FaceText:
    """How a call describes the face. caption: None for the photograph's own description. moment:
    whether that goes into the prompt with what only belongs to the moment, such as the expression.
    Legacy mode describes every face alike.
    """

    caption: str | None = None
    moment: bool = False


def encode_people(
    pipe: Any, adapter: Adapter, photos: Photo | list[Photo], name: str = "", face: int = 0
) -> Identity:
    """Does what `ConsistentIDMixin.encode_identity` does, with any pipeline's image encoder."""
    spec, mode = adapter.model.spec, adapter.model.mode
    listed = list(photos) if isinstance(photos, list | tuple) else [photos]
    if not listed:
        raise ConfigError("no photograph is given; expected one, or several of one person")
    files = [as_record(photo) for photo in (listed[:1] if mode == "legacy" else listed)]
    key = (face, *(f"{file.source} {file.sha256}" for file in files))
    if (person := adapter.remembered(pipe.image_encoder, key)) is not None:
        return person
    records = [
        adapter.reader.read(file, name or shown_name(photo), face)
        for file, photo in zip(files, listed, strict=False)
    ]
    with _image_encoder(pipe, adapter) as (encoder, device):
        people = [
            encode_photo(record, encoder, spec, mode, adapter.reader.embedder, device)
            for record in records
        ]
    adapter.zero_states[pipe.image_encoder] = people[0].zero_hidden[0]
    return adapter.remember(pipe.image_encoder, key, joined(people))


def people_of(
    pipe: Any,
    adapter: Adapter,
    photos: Photo | list[Photo] | None,
    identity: Identity | Sequence[Identity] | None,
) -> list[Identity]:
    """Returns the people of a call, which gives either photographs of one or identities.

    Raises ConfigError if it gives both or nothing.
    """
    if (identity is None) == (photos is None):
        raise ConfigError(
            "an adapter is loaded: pass either input_id_images or identity, or unload it"
        )
    if photos is not None:
        identity = encode_people(pipe, adapter, photos)
    people = [identity] if isinstance(identity, Identity) else identity
    if not isinstance(people, list | tuple) or not all(isinstance(p, Identity) for p in people):
        raise ConfigError(
            f"identity={type(identity).__name__}: expected what encode_identity or Identity.load "
            "returns, or a list of such"
        )
    return list(people)


def guidance_of(
    pipe: Any,
    adapter: Adapter,
    people: Sequence[Identity],
    call: Mapping[str, Any],
    face: FaceText = FaceText(),
) -> Guidance:
    """Computes the conditioning of a call.

    pipe: the pipeline, for its tokenizers, text encoders and device. people: one, or one for each
    prompt. call: the arguments of diffusers' call. Raises ConfigError if the numbers of prompts,
    negative prompts and people differ, or if a person doesn't fit the adapter.
    """
    for person in people:
        adapter.check(person)
    _check_encoder(pipe, adapter, people)
    if not isinstance(face.caption, str | None):
        raise ConfigError(f"face_caption={face.caption!r}: expected a text that describes the face")
    with _lora_scale(pipe, call):
        if call.get("prompt_embeds") is not None:
            return _from_embeddings(pipe, adapter, people, call)
        return _from_prompts(pipe, adapter, people, call, face)


def embeddings(guidance: Guidance, *, late: bool) -> dict[str, Any]:
    """Returns the arguments of diffusers' call that replace the prompts. late: whether to begin
    with the second phase.
    """
    arguments: dict[str, Any] = dict.fromkeys(_TEXTS[::2])
    arguments["prompt_embeds"] = guidance.late if late else guidance.early
    arguments["negative_prompt_embeds"] = guidance.negative
    if guidance.pooled_negative is not None:
        arguments |= dict.fromkeys(_TEXTS)
        pooled = guidance.pooled_late if late else guidance.pooled_early
        arguments["pooled_prompt_embeds"] = pooled
        arguments["negative_pooled_prompt_embeds"] = guidance.pooled_negative
    return arguments


def prompt_text(
    pipe: Any, adapter: Adapter, person: Identity, prompt: str, face: FaceText
) -> tuple[TextTokens, list[str]]:
    """Returns the text of a prompt's second phase, and what its author should know of it."""
    description = None
    if adapter.model.mode == "corrected":
        description = describe(
            person.record.face_caption, prompt, override=face.caption, moment=face.moment
        )
    tokens = prompt_tokens(
        adapter.model,
        person,
        prompt,
        description.text if description else "",
        adapter.marked(pipe.tokenizer),
        getattr(pipe, "tokenizer_2", None),
    )
    return tokens, prompt_notices(tokens, description)


def _both_texts(
    pipe: Any,
    adapter: Adapter,
    person: Identity,
    prompt: str,
    prompt_2: str | None,
    face: FaceText,
) -> TextTokens:
    """Returns a prompt's text, and logs what its author should know.

    prompt_2: another prompt for the second text encoder. Regions are fused into the states of both
    encoders at the positions that they have in the first prompt.
    """
    tokens, notices = prompt_text(pipe, adapter, person, prompt, face)
    if prompt_2 is not None:
        second, _ = prompt_text(pipe, adapter, person, prompt_2, face)
        if not torch.equal(second.token_mask, tokens.token_mask):
            notices.append(
                "prompt_2 has another number of tokens than prompt, so the regions' nouns are "
                "elsewhere in it, and the second text encoder's share of them changes other words."
            )
        tokens = replace(tokens, input_ids_2=second.input_ids_2)
    for notice in notices:
        if adapter.is_new(notice):
            logger.warning(notice)
    return tokens


def _from_prompts(
    pipe: Any,
    adapter: Adapter,
    people: Sequence[Identity],
    call: Mapping[str, Any],
    face: FaceText,
) -> Guidance:
    device = pipe._execution_device
    texts = call.get("prompt")
    if not isinstance(texts, str | list | tuple) or texts in ([], ()):
        raise ConfigError(f"prompt={texts!r}: expected a text or a list of texts")
    count = 1 if isinstance(texts, str) else len(texts)
    prompts = [text or "" for text in texts_of(pipe, texts, count, "prompt")]
    seconds = texts_of(pipe, call.get("prompt_2"), count, "prompt_2")
    each = _for_each(people, count, "prompts")
    tokens = [
        _both_texts(pipe, adapter, *row, face) for row in zip(each, prompts, seconds, strict=True)
    ]
    tokenizer = adapter.marked(pipe.tokenizer)
    early = [
        early_ids(adapter.model, *row, tokenizer)
        for row in zip(tokens, prompts, seconds, strict=True)
    ]
    late = [(text.input_ids, text.input_ids_2) for text in tokens]
    return guidance_states(
        adapter.model,
        adapter.tokens_of(each, device),
        tokens,
        early=adapter.text_states(pipe, early, device, call.get("clip_skip")),
        late=adapter.text_states(pipe, late, device, call.get("clip_skip")),
        negative=_negative_states(pipe, adapter, call, count, device),
        strength=adapter.strength,
    )


def _from_embeddings(
    pipe: Any, adapter: Adapter, people: Sequence[Identity], call: Mapping[str, Any]
) -> Guidance:
    """Adds ID tokens to text embeddings that the caller computed. No regions are fused, since it
    isn't known where their nouns are.
    """
    positive: Tensor = call["prompt_embeds"]
    count, device = len(positive), pipe._execution_device
    tokens = adapter.tokens_of(_for_each(people, count, "prompt_embeds"), device)
    negative = call.get("negative_prompt_embeds")
    pooled_negative = call.get("negative_pooled_prompt_embeds")
    if negative is None:
        states = _negative_states(pipe, adapter, call, count, device)
        negative, pooled_negative = states.hidden, states.pooled
    identity, no_identity = (
        torch.stack([getattr(each, name) for each in tokens]).to(positive)
        for name in ("identity", "no_identity")
    )
    text = torch.cat((positive, identity), dim=1)
    pooled = call.get("pooled_prompt_embeds")
    return Guidance(
        early=text,
        late=text,
        negative=torch.cat((negative.to(positive), no_identity), dim=1),
        pooled_early=pooled,
        pooled_late=pooled,
        pooled_negative=pooled_negative,
    )


def _negative_states(
    pipe: Any, adapter: Adapter, call: Mapping[str, Any], count: int, device: torch.device
) -> TextStates:
    """Encodes the negative prompts; as in diffusers, clip_skip doesn't concern them.

    device: the pipeline's, which diffusers finds by visiting all of its modules.
    """
    firsts = texts_of(pipe, call.get("negative_prompt"), count, "negative_prompt")
    seconds = texts_of(pipe, call.get("negative_prompt_2"), count, "negative_prompt_2")
    tokenizer = adapter.marked(pipe.tokenizer)
    texts = [plain_ids(a or "", tokenizer, b) for a, b in zip(firsts, seconds, strict=True)]
    return adapter.text_states(pipe, texts, device)


def texts_of(
    pipe: Any, texts: str | Sequence[str] | None, count: int, name: str
) -> list[str | None]:
    """Returns a text or None for each of `count` prompts, with the tokens of textual inversion."""
    listed = list(texts) if isinstance(texts, list | tuple) else [cast(str | None, texts)] * count
    if not all(isinstance(text, str | None) for text in listed):
        raise ConfigError(f"{name}={texts!r}: expected a text or a list of texts")
    if len(listed) != count:
        raise ConfigError(f"{len(listed)} texts in {name} for {count} prompts; pass one or {count}")
    if not hasattr(pipe, "maybe_convert_prompt"):
        return listed
    return [
        None if text is None else pipe.maybe_convert_prompt(text, pipe.tokenizer) for text in listed
    ]


@contextmanager
def _image_encoder(pipe: Any, adapter: Adapter) -> Iterator[tuple[Any, torch.device]]:
    """Yields the image encoder, which is loaded at the first use, and the device of its input.

    If diffusers has moved the other models off the device, the encoder goes too, afterwards.
    """
    device: torch.device = pipe._execution_device
    encoder = pipe.image_encoder
    if encoder is None:
        if not adapter.image_encoder:
            raise ConfigError(
                "the pipeline has no image encoder, which the photograph needs; pass "
                "image_encoder=FOLDER to load_consistentid_adapter"
            )
        encoder = load_image_encoder(adapter.image_encoder, pipe.unet.conv_in.weight.dtype)
        register = getattr(pipe, "register_modules", None) or pipe.update_components  # of a modular
        register(image_encoder=encoder)
    managed = hasattr(encoder, "_hf_hook")  # accelerate moves it
    if not managed:
        encoder.to(device)
    yield encoder, device
    if not managed and hasattr(pipe.unet, "_hf_hook"):
        encoder.to("cpu")


def _check_encoder(pipe: Any, adapter: Adapter, people: Sequence[Identity]) -> None:
    """Raises ConfigError for a person whom another image encoder than the pipeline's has encoded.

    Its states of zero pixels tell: it computes them once. Without an image encoder in the pipeline
    nothing is compared.
    """
    if pipe.image_encoder is None:
        return
    own = adapter.zero_states.get(pipe.image_encoder)
    if own is None:
        with _image_encoder(pipe, adapter) as (encoder, device):
            side = adapter.model.spec.vision_size
            own = encode_images(encoder, torch.zeros(1, 3, side, side, device=device))[0, 0].cpu()
        adapter.zero_states[pipe.image_encoder] = own
    for person in people:
        # The tolerance allows for half precision. Other image encoders differ by far more.
        zero = person.zero_hidden[0].float()
        if zero.shape != own.shape or not torch.allclose(zero, own.float(), rtol=0.05, atol=0.05):
            raise ConfigError(
                f"the identity of {person.record.source} was made with another image encoder than "
                "the pipeline's; make it again from the photograph"
            )


def _for_each(people: Sequence[Identity], count: int, name: str) -> list[Identity]:
    if len(people) not in (1, count):
        raise ConfigError(f"{len(people)} people for {count} {name}; pass one person or {count}")
    return list(people) * (count if len(people) == 1 else 1)


@contextmanager
def _lora_scale(pipe: Any, call: Mapping[str, Any]) -> Iterator[None]:
    """Scales LoRA of peft in the text encoders, as diffusers does while it encodes prompts."""
    scale = (call.get("cross_attention_kwargs") or {}).get("scale")
    encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
    scaled = [encoder for encoder in encoders if encoder is not None and scale is not None]
    for encoder in scaled:
        scale_lora_layers(encoder, scale)
    try:
        yield
    finally:
        for encoder in scaled:
            unscale_lora_layers(encoder, scale)
