"""Reads the objects of a JSON file of any size one at a time.

The file is an array of objects, or holds one object after another (JSON Lines).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

from configs.errors import SourceError

_CHUNK: Final = 1 << 16  # characters read at a time
# Characters of one object. Bounds how much is read of a file that is broken in its middle.
_MAX_OBJECT: Final = 1 << 24
_SEPARATORS: Final = " \t\r\n,"
_DECODER: Final = json.JSONDecoder()


def read_objects(file: Path) -> Iterator[dict[str, Any]]:
    """Yields each object. Raises SourceError if the file can't be read or holds anything else."""
    count = 0
    try:
        with file.open(encoding="utf-8-sig") as stream:
            for value in _objects(stream):
                count += 1
                yield value
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(
            f"{file}: entry {count + 1:,} can't be read: {error}. Expected a JSON array of "
            "objects, or one object a line."
        ) from None


def _objects(stream: IO[str]) -> Iterator[dict[str, Any]]:
    buffer = _skip_separators(stream, "")
    is_array = buffer.startswith("[")
    buffer = buffer.removeprefix("[")
    while buffer := _skip_separators(stream, buffer):
        if is_array and buffer.startswith("]"):
            return
        if not buffer.startswith("{"):
            raise ValueError(f"it begins with {buffer[:20]!r}")
        value, buffer = _decode_first(stream, buffer)
        yield value
    if is_array:
        raise ValueError("the file ends before its array does")


def _skip_separators(stream: IO[str], buffer: str) -> str:
    """Returns `buffer` without leading separators, read on if nothing is left; "" at the end of the
    file.
    """
    while not (buffer := buffer.lstrip(_SEPARATORS)):
        if not (buffer := stream.read(_CHUNK)):
            return ""
    return buffer


def _decode_first(stream: IO[str], buffer: str) -> tuple[dict[str, Any], str]:
    """Returns (the object that `buffer` begins with, the rest of the buffer).

    Reads on if the object is incomplete. Raises ValueError if it isn't valid JSON.
    """
    while True:
        try:
            value, end = _DECODER.raw_decode(buffer)
        except ValueError:
            # Double the buffer each time, so that the number of attempts stays small.
            more = "" if len(buffer) > _MAX_OBJECT else stream.read(max(_CHUNK, len(buffer)))
            if not more:
                raise
            buffer += more
        else:
            return value, buffer[end:]
