"""Removes thinking and Markdown from an answer."""

from __future__ import annotations

import json
import re
from typing import Any, Final

_TAGS: Final = "think|thinking|thought|reasoning|analysis"
_THOUGHTS: Final = re.compile(rf"<({_TAGS})>.*?</\1>", re.DOTALL | re.IGNORECASE)
_OPENED: Final = re.compile(rf"<(?:{_TAGS})>.*", re.DOTALL | re.IGNORECASE)
# templates of some models write the first tag into the prompt
_CLOSED: Final = re.compile(rf"^.*</(?:{_TAGS})>", re.DOTALL | re.IGNORECASE)
# tokens of a chat template that a server didn't remove
_SPECIAL: Final = re.compile(r"<\|[^|<>\n]{1,40}\|>|</?(?:answer|s|output|response)>")
_KIMI: Final = re.compile(r"◁(/?)(\w+)▷")  # its tags

_BREAK: Final = re.compile(r"</?(?:p|br|div|li|ul|ol|tr|h[1-6])\b[^<>]*>", re.IGNORECASE)
_HTML: Final = re.compile(r"</?(?:b|i|u|em|strong|span|body|html|td|th|table)\b[^<>]*>", re.I)

_FENCE: Final = re.compile(r"^\s*(?:```|~~~)\w*\s*$")
_HEADING: Final = re.compile(r"^\s{0,3}#{1,6}\s+")
_RULE: Final = re.compile(r"^\s*(?:[-*_]\s*){3,}$")
# of a list's item or a quotation
_BULLET: Final = re.compile(r"^\s*(?:[-*•+>]|\d{1,2}[.)])\s+(?=\S)")
_ROW: Final = re.compile(r"^\s*\|(.*)\|\s*$")
_RULED: Final = re.compile(r"^\s*\|[\s:|-]*-[\s:|-]*\|\s*$")
_INLINE: Final = (
    (re.compile(r"\*\*|(?<!\w)__|__(?!\w)|`+"), ""),
    (re.compile(r"(?<![\w*])\*(?=\S)([^*\n]*[^\s*])\*(?![\w*])"), r"\1"),
    (re.compile(r"(?<!\w)_(?=\S)([^_\n]*[^\s_])_(?!\w)"), r"\1"),
    (re.compile(r"!?\[([^\]\n]*)\]\([^)\n]*\)"), r"\1"),
)


def without_thinking(text: str) -> tuple[str, bool]:
    """Returns the text without thinking, which is all of it if the thinking has no end, and
    whether there was any.
    """
    text = _KIMI.sub(r"<\1\2>", text)
    rest = _CLOSED.sub("", _OPENED.sub("", _THOUGHTS.sub("", text)))
    return _SPECIAL.sub("", rest).strip(), rest != text


def without_markdown(text: str, *, ends: bool) -> tuple[str, bool]:
    """Returns the text as prose on one line, and True; the text itself and False if it has no
    Markdown, HTML or JSON. Headings are left out, and each item of a list becomes a sentence.

    ends: whether the last line is complete.
    """
    plain = _HTML.sub("", _BREAK.sub("\n", _texts_of_json(text)))
    lines = plain.splitlines()
    marked = any(_is_marked(line) for line in lines)
    if not marked and _inline(plain) == text:
        return text, False
    return _joined(_prose(lines), ends=ends), True


def _texts_of_json(text: str) -> str:
    """Returns the texts in an answer that is JSON, a line for each; else the answer itself."""
    body = re.sub(r"^```\w*\s*|\s*```$", "", text)
    if body[:1] not in ("{", "["):
        return text
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return text
    return "\n".join(_strings(value))


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        values = value.values() if isinstance(value, dict) else value
        return [text for each in values for text in _strings(each)]
    return [value] if isinstance(value, str) else []


def _is_marked(line: str) -> bool:
    patterns = (_FENCE, _HEADING, _RULE, _BULLET, _RULED)
    return any(pattern.match(line) for pattern in patterns)


def _inline(text: str) -> str:
    for pattern, replacement in _INLINE:
        text = pattern.sub(replacement, text)
    return text


def _prose(lines: list[str]) -> list[str]:
    """Returns the lines that say something, without their marks."""
    prose = []
    for number, line in enumerate(lines):
        following = lines[number + 1] if number + 1 < len(lines) else ""
        titles_table = _ROW.match(line) and _RULED.match(following)
        if any(p.match(line) for p in (_FENCE, _HEADING, _RULE, _RULED)) or titles_table:
            continue
        if row := _ROW.match(line):
            line = ": ".join(cell.strip() for cell in row[1].split("|", 1))
        text = _inline(_BULLET.sub("", line)).strip()
        if text:
            prose.append(text)
    return prose


def _joined(lines: list[str], *, ends: bool) -> str:
    """Joins lines by spaces, with a period where a line has no mark at its end."""
    parts = []
    for number, line in enumerate(lines):
        last = number == len(lines) - 1
        goes_on = not last and lines[number + 1][0].islower()
        complete = ends if last else not goes_on
        parts.append(f"{line}." if complete and line[-1] not in ".!?:;,…\"'”’)" else line)
    return " ".join(parts)
