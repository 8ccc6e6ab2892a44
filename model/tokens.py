"""Texts as the model reads them: token ids, and the slots of the regions in them, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from model.prompt import MarkedText, fused_regions, tokenize_marked
from model.spec import TOKEN_LIMIT
from stages.regions import MAX_REGIONS, Mode

SECOND_PAD: Final = 0  # SDXL's second tokenizer pads with "!", not with EOS


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTokens:
    """A marked text as the model reads it; the fields are those of `Conditions`.

    cut: the last words of the user's prompt that aren't read; "" if all are.
    """

    text: str
    cut: str
    regions: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...]
    input_ids: Tensor
    input_ids_2: Tensor
    token_mask: Tensor
    token_idx: Tensor
    token_valid: Tensor


def text_tokens(
    text: MarkedText, tokenizer: Any, mode: Mode, tokenizer_2: Any = None
) -> TextTokens:
    """Tokenizes a marked text and gives each region with a mark a slot. tokenizer, tokenizer_2: as
    in `build_conditions`.
    """
    tokens, slots, dropped = fused_regions(text, tokenizer, mode)
    mask = torch.zeros(TOKEN_LIMIT, dtype=torch.bool)
    mask[list(tokens.positions)] = True
    idx = torch.zeros(MAX_REGIONS, dtype=torch.int64)
    idx[: len(slots)] = torch.tensor(tokens.positions, dtype=torch.int64)
    return TextTokens(
        text=text.text,
        cut=text.cut,
        regions=slots,
        dropped=dropped,
        input_ids=torch.tensor(tokens.ids, dtype=torch.int64),
        input_ids_2=_second_ids(text.text, tokens.ids, tokenizer, tokenizer_2, mode),
        token_mask=mask,
        token_idx=idx,
        token_valid=torch.arange(MAX_REGIONS) < len(slots),
    )


def empty_ids(tokenizer: Any, *, pad_id: int | None = None) -> Tensor:
    """Returns the ids of an empty text, (77,) int64. pad_id: None for the tokenizer's own."""
    return torch.tensor(
        tokenize_marked("", tokenizer, keep_eos=True, pad_id=pad_id).ids, dtype=torch.int64
    )


def _second_ids(
    text: str, ids: Sequence[int], tokenizer: Any, tokenizer_2: Any, mode: Mode
) -> Tensor:
    """Returns the ids for a second text encoder, (77,) int64.

    legacy: the second tokenizer has no facial mark and tokenizes it as text, which shifts the
    tokens behind it (reference: the SDXL pipeline). corrected: the first tokenizer's ids with
    another padding, so that a noun has the same position for both encoders.
    """
    if mode == "legacy" and tokenizer_2 is not None:
        second = tokenizer_2.encode(text, verbose=False)[:TOKEN_LIMIT]
        return torch.tensor(
            [*second, *[SECOND_PAD] * (TOKEN_LIMIT - len(second))], dtype=torch.int64
        )
    first_eos = (
        list(ids).index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else TOKEN_LIMIT
    )
    padding = [SECOND_PAD] * (TOKEN_LIMIT - first_eos - 1)
    return torch.tensor([*ids[: first_eos + 1], *padding], dtype=torch.int64)
