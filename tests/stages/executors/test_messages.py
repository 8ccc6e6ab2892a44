"""Messages over a pipe: they are read one at a time, and a truncated one is an error."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from typing import IO

import pytest

from stages.executors.messages import ERROR, READY, STAGE, pack, receive, send, unpack
from stages.record import Record, key_of


@pytest.fixture
def pipe() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """A pipe's reading and its writing end."""
    read, write = os.pipe()
    with os.fdopen(read, "rb") as reader, os.fdopen(write, "wb") as writer:
        yield reader, writer


def test_a_second_message_stays_in_the_pipe_where_select_sees_it(
    pipe: tuple[IO[bytes], IO[bytes]],
) -> None:
    reader, writer = pipe
    send(writer, b"first")
    send(writer, b"")
    assert receive(reader) == b"first"
    assert select.select([reader], [], [], 0)[0]
    assert receive(reader) == b""
    assert not select.select([reader], [], [], 0)[0]


def test_a_truncated_message_is_the_end_of_the_stream(pipe: tuple[IO[bytes], IO[bytes]]) -> None:
    reader, writer = pipe
    send(writer, b"whole")
    writer.write(b"\x08\0\0\0\0\0\0\0half")
    writer.close()
    assert receive(reader) == b"whole"
    with pytest.raises(EOFError):
        receive(reader)


def test_a_packed_record_is_unpacked_unchanged_and_differs_from_other_messages() -> None:
    record = Record(key=key_of("a"), source="a", image=b"\xff\xd8", caption="ä")
    data = pack(record)
    unpacked = unpack(data)
    assert (unpacked.key, unpacked.image, unpacked.caption) == (
        record.key,
        record.image,
        record.caption,
    )
    assert not data.startswith((READY, STAGE, ERROR))
