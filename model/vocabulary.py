"""CLIP's tokenizer, made from the vocabulary file that CLIP's authors published.

This module doesn't import torch.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any, Final

from configs.errors import WeightsError

_MERGES: Final = 48_894


def clip_tokenizer(vocab_path: Path) -> Any:
    """Makes CLIP's tokenizer (49,408 entries, padding with EOS).

    vocab_path: its `bpe_simple_vocab_16e6.txt.gz`. Raises WeightsError if the file is not that
    vocabulary.
    """
    from transformers import CLIPTokenizer

    with gzip.open(vocab_path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : _MERGES + 1]]
    if len(merges) != _MERGES or any(len(merge) != 2 for merge in merges):
        raise WeightsError(
            f"{vocab_path} holds no CLIP vocabulary: expected {_MERGES} merges after a header line;"
            " delete the file to have it downloaded again"
        )
    letters = _byte_letters()
    words = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *("".join(merge) for merge in merges),
    ]
    vocab = {word: index for index, word in enumerate((*words, "<|startoftext|>", "<|endoftext|>"))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _byte_letters() -> list[str]:
    """Returns the character that represents each byte, in CLIP's order.

    Printable bytes are represented by themselves, the others by characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(0x100 + index) for index in range(len(others))]
