"""Messages over a pipe: whole, and one at a time."""

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
    """Both ends: to read, to write."""
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


def test_a_message_cut_off_is_the_end(pipe: tuple[IO[bytes], IO[bytes]]) -> None:
    reader, writer = pipe
    send(writer, b"whole")
    writer.write(b"\x08\0\0\0\0\0\0\0half")
    writer.close()
    assert receive(reader) == b"whole"
    with pytest.raises(EOFError):
        receive(reader)


def test_a_packed_record_is_read_back_and_no_other_kind_of_message() -> None:
    record = Record(key=key_of("a"), source="a", image=b"\xff\xd8", caption="ä")
    data = pack(record)
    back = unpack(data)
    assert (back.key, back.image, back.caption) == (record.key, record.image, record.caption)
    assert not data.startswith((READY, STAGE, ERROR))
