"""The states of texts, which the text encoders compute once."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Final

import torch

from infer.conditioning import Ids, TextStates, text_states
from model.consistentid import HasTextEncoders

_CACHED_TEXTS: Final = 64


class TextCache:
    """States of the last texts that an encoder read. They are forgotten when the encoder's weights
    change; an encoder with a LoRA of peft is not cached, because its scale may change unseen.
    """

    def __init__(self) -> None:
        self._version: object = None
        self._states: dict[object, TextStates] = {}

    def states(
        self,
        encoders: HasTextEncoders,
        texts: Sequence[Ids],
        device: torch.device,
        clip_skip: int | None,
    ) -> TextStates:
        version = _version(encoders)
        if version is None:
            return text_states(encoders, texts, device, clip_skip)
        keys = [_key(text, device, clip_skip) for text in texts]
        if version != self._version or len(self._states) + len(keys) > _CACHED_TEXTS:
            self._version, self._states = version, {}
        missing = {k: text for k, text in zip(keys, texts, strict=True) if k not in self._states}
        if missing:
            new = text_states(encoders, list(missing.values()), device, clip_skip)
            self._states |= {key: new.rows([row]) for row, key in enumerate(missing)}
        rows = [self._states[key] for key in keys]
        pooled = [row.pooled for row in rows if row.pooled is not None]
        return TextStates(
            hidden=torch.cat([row.hidden for row in rows]),
            pooled=torch.cat(pooled) if pooled else None,
        )


def _key(text: Ids, device: torch.device, clip_skip: int | None) -> object:
    return (*text[0].tolist(), *text[1].tolist(), str(device), clip_skip)


def _version(encoders: HasTextEncoders) -> object:
    """Returns a value that changes with the text encoders' weights. None for an encoder with a LoRA
    of peft, because its scale changes the states too.
    """
    names = ("text_encoder", "text_encoder_2")
    modules = [each for name in names if (each := getattr(encoders, name, None)) is not None]
    if any(getattr(module, "peft_config", None) for module in modules):
        return None
    # Weak references, because a new module may get the addresses of one that is gone.
    versions = [
        (id(tensor), tensor._version, tensor.dtype)
        for module in modules
        for tensor in module.parameters()
    ]
    return tuple(weakref.ref(module) for module in modules), versions
