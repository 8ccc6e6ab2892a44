"""Finds inputs with the same bytes.

Compares sizes first, then the first 4 KB, then the whole file, so that few files are read whole.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Set
from typing import Any

from pipelines.planning.input_index import InputIndex
from pipelines.sources import Input, Source
from stages.base import Rejection

_PREFIX = 4096  # bytes


def mark_exact_copies(index: InputIndex, source: Source, removed_keys: Set[str]) -> None:
    """Marks each input that has the same bytes as an earlier one, in the plan's order.

    removed_keys: of removed inputs; no other record may name them as its original.
    """
    copies: list[list[Input]] = []
    for group in index.groups_of_equal_size(1, source.max_bytes):
        allowed = [item for item in group if item.key not in removed_keys]
        by_prefix = _split([allowed], lambda item: _digest(source, item, _PREFIX))
        copies += _split(by_prefix, lambda item: _digest(source, item, -1))
    for original, *others in copies:
        for item in others:
            index.mark_exact_copy(item, original)


def _split(groups: Iterable[list[Input]], key: Callable[[Input], Any]) -> list[list[Input]]:
    """Divides each group by `key` and returns the parts with at least two inputs, in order.

    Inputs whose key is None are left out.
    """
    parts = []
    for group in groups:
        by_key: dict[Any, list[Input]] = defaultdict(list)
        for item in group:
            if (value := key(item)) is not None:
                by_key[value].append(item)
        parts += [part for part in by_key.values() if len(part) > 1]
    return parts


def _digest(source: Source, item: Input, count: int) -> str | None:
    """Returns the sha256 of the first `count` bytes (-1: all).

    None if the input can't be read: the run reads it again and records the reason.
    """
    try:
        return hashlib.sha256(source.read_with_retries(item, count)).hexdigest()
    except Rejection:
        return None
