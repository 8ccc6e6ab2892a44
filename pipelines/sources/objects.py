"""The objects of a JSON file of any size, one at a time: an array of them, or one after another
(JSON Lines).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

from configs.errors import SourceError

_CHUNK: Final = 1 << 16  # characters
# characters of one object; a file broken in its middle isn't read to its end
_LONGEST: Final = 1 << 24
_BETWEEN: Final = " \t\r\n,"
_DECODER: Final = json.JSONDecoder()


def read_objects(file: Path) -> Iterator[dict[str, Any]]:
    """Raises SourceError where the file can't be read, or holds anything else than objects."""
    number = 0
    try:
        with file.open(encoding="utf-8-sig") as stream:
            for found in _objects(stream):
                number += 1
                yield found
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(
            f"{file}: entry {number + 1:,} can't be read: {error}. Expected a JSON array of "
            "objects, or one a line."
        ) from None


def _objects(stream: IO[str]) -> Iterator[dict[str, Any]]:
    rest = _next(stream, "")
    array = rest.startswith("[")
    rest = rest.removeprefix("[")
    while rest := _next(stream, rest):
        if array and rest.startswith("]"):
            return
        if not rest.startswith("{"):
            raise ValueError(f"it begins with {rest[:20]!r}")
        found, rest = _take(stream, rest)
        yield found
    if array:
        raise ValueError("the file ends before its array does")


def _next(stream: IO[str], rest: str) -> str:
    """`rest` and what follows, from the next character that means something on; "" at the file's
    end.
    """
    while not (rest := rest.lstrip(_BETWEEN)):
        if not (rest := stream.read(_CHUNK)):
            return ""
    return rest


def _take(stream: IO[str], rest: str) -> tuple[dict[str, Any], str]:
    """The object that `rest` begins with, and what has been read behind it. Raises ValueError."""
    while True:
        try:
            found, end = _DECODER.raw_decode(rest)
        except ValueError:
            more = "" if len(rest) > _LONGEST else stream.read(max(_CHUNK, len(rest)))
            if not more:
                raise
            rest += more
        else:
            return found, rest[end:]
