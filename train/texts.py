"""Texts as the UNet reads them: the text encoders' states, as one row of numbers for each text.

A row has the states of the 77 tokens (77 · C) and then the pooled states (P, of SDXL only).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.consistentid import HasTextEncoders, encode_text
from model.spec import TOKEN_LIMIT
from model.tokens import SECOND_PAD, empty_ids


class TextStates(NamedTuple):
    """A text's row. ids: (2, 77) int64, of what it was computed. states: (77 · C + P,)."""

    ids: Tensor
    states: Tensor


class TextPlaces(NamedTuple):
    """Where the rows of B texts come from.

    stored: (n, 77 · C + P), those that are known; None if none is. encoded: (m,) int64, which of
    the B texts are to be encoded. rows: (B,) int64, the place of each text's row among that of the
    empty text, `stored` and those of the encoded texts, in this order.
    """

    stored: Tensor | None
    encoded: Tensor
    rows: Tensor


def text_ids(input_ids: Tensor, input_ids_2: Tensor) -> Tensor:
    """Returns the ids for both text encoders, each (…, 77), as (…, 2, 77)."""
    return torch.stack((input_ids, input_ids_2), dim=-2)


def empty_text_ids(tokenizer: Any) -> Tensor:
    """Returns the ids of an empty text, (2, 77) int64."""
    return text_ids(empty_ids(tokenizer), empty_ids(tokenizer, pad_id=SECOND_PAD))


@torch.no_grad()
def text_states(encoders: HasTextEncoders, ids: Tensor) -> Tensor:
    """Ids (N, 2, 77) → rows (N, 77 · C + P)."""
    hidden, pooled = encode_text(encoders, ids[:, 0], ids[:, 1])
    states = hidden.flatten(1)
    return states if pooled is None else torch.cat((states, pooled), dim=1)


def split_states(encoders: HasTextEncoders, states: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows (N, 77 · C + P) → the tokens' states (N, 77, C), and the pooled ones (N, P) or None."""
    second = getattr(encoders, "text_encoder_2", None)
    pooled = 0 if second is None else int(second.config.projection_dim)
    end = states.shape[1] - pooled
    hidden = states[:, :end].reshape(len(states), TOKEN_LIMIT, -1)
    return hidden, states[:, end:] if pooled else None


def text_places(ids: Tensor, empty: Tensor, states: Sequence[Tensor | None]) -> TextPlaces:
    """Returns where the rows of B texts come from.

    ids: (B, 2, 77). empty: those of the empty text, (2, 77). states: each text's row; None if it
    isn't known.
    """
    is_empty = (ids == empty).flatten(1).all(1).tolist()
    shown = [place for place, without in enumerate(is_empty) if not without]
    stored = [place for place in shown if states[place] is not None]
    encoded = [place for place in shown if states[place] is None]
    rows = torch.zeros(len(ids), dtype=torch.int64)
    rows[[*stored, *encoded]] = torch.arange(1, 1 + len(shown))
    values = [each for place in stored if (each := states[place]) is not None]
    return TextPlaces(
        stored=torch.stack(values) if values else None,
        encoded=torch.tensor(encoded, dtype=torch.int64),
        rows=rows,
    )
