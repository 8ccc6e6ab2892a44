"""Exact copies among the inputs: sizes first, then the first 4 KB, then the whole file, so that few
are read whole.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from pipelines.planning.input_index import InputIndex
from pipelines.sources import Input, Source
from stages.base import Rejection

_PREFIX = 4096


def mark_copies(index: InputIndex, source: Source) -> None:
    """Mark each input whose bytes are those of an earlier one, in the plan's order."""
    found: list[list[Input]] = []
    for group in index.same_size(1, source.limit):
        by_prefix = _split([group], lambda item: _digest(source, item, _PREFIX))
        found += _split(by_prefix, lambda item: _digest(source, item, -1))
    for first, *copies in found:
        for copy in copies:
            index.mark_copy(copy, first)


def _split(groups: Iterable[list[Input]], by: Callable[[Input], Any]) -> list[list[Input]]:
    """Each group cut by `by`, keeping order; groups of one can't hold copies and are left out."""
    kept = []
    for group in groups:
        parts: dict[Any, list[Input]] = defaultdict(list)
        for item in group:
            if (value := by(item)) is not None:
                parts[value].append(item)
        kept += [part for part in parts.values() if len(part) > 1]
    return kept


def _digest(source: Source, item: Input, count: int) -> str | None:
    """sha256 of the first `count` bytes; None for an input that can't be read: the run itself will
    say why.
    """
    try:
        return hashlib.sha256(source.fetch(item, count)).hexdigest()
    except Rejection:
        return None
