"""Sentences of an answer: where they begin and end, and the text without what is quoted."""

from __future__ import annotations

import re
from typing import Final

_BOUNDARY: Final = re.compile(r"""[.!?…]+["'”’)\]]*(?=\s|$)""")
_NEXT: Final = re.compile(r"""\s+["“'‘(]?[^\W\d_a-zß-öø-ÿ]|\s+["“'‘(]?\d|\s*$""")
# they end in a period and not a sentence
_ABBREVIATION: Final = re.compile(
    r"(?:\b(?:mr|mrs|ms|dr|sgt|lt|capt|gen|prof|st|jr|sr|vs|approx|ca|no|e\.g|i\.e|etc)|\b[a-z])\.$",
    re.IGNORECASE,
)
_ITEM: Final = re.compile(r"(?:^|\s)\d{1,2}\.$")  # the number of a list's item
_LONGEST: Final = 10  # characters of an abbreviation or a number, with what stands before it
_QUOTED: Final = re.compile(
    r"""["“][^"“”\n]{1,200}["”]|(?<![\w'’])['‘][^'‘’\n]{1,80}(?:['’]\w[^'‘’\n]{0,40}){0,2}['’](?!\w)"""
)


def sentences(text: str) -> list[str]:
    """Returns the sentences of a text, in order; only the last one may lack its end."""
    parts, start = [], 0
    for end in _ends(text):
        parts.append(text[start:end].strip())
        start = end
    return [part for part in (*parts, text[start:].strip()) if part]


def full_sentences(text: str) -> str:
    """Returns the text up to the end of its last full sentence; "" if it has none."""
    ends = _ends(text)
    return text[: ends[-1]].strip() if ends else ""


def _ends(text: str) -> list[int]:
    ends = []
    for match in _BOUNDARY.finditer(text):
        head = text[max(0, match.end() - _LONGEST) : match.end()]
        if _ABBREVIATION.search(head) or _ITEM.search(head):
            continue
        if _NEXT.match(text, match.end()):
            ends.append(match.end())
    return ends


def unquoted(text: str) -> str:
    """Returns the text with everything in quotation marks replaced by as many spaces: what is
    written on a shirt says nothing about the answer.
    """
    return _QUOTED.sub(lambda match: " " * len(match[0]), text)
