"""Messages between a worker and its child process: bytes with their length in front, over pipes.

Records travel as Arrow, one in a message. The first byte of what the child sends tells the kinds of
message apart: an Arrow stream begins with neither STAGE nor ERROR.
"""

from __future__ import annotations

import os
import struct
from typing import IO, Final

import pyarrow as pa

from stages.record import Record, from_table, to_table

READY: Final = b"ready"  # sent once, when the stages are set up
STAGE: Final = b"@"  # followed by the name of the stage that the record enters
ERROR: Final = b"!"  # followed by the text of a PipelineError
_LENGTH: Final = struct.Struct("<Q")


def send(stream: IO[bytes], data: bytes) -> None:
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes:
    """Returns the next message. Raises EOFError if the other side has ended.

    Reads past Python's buffer, which could hold the next message where `select` doesn't see it.
    """
    (length,) = _LENGTH.unpack(_read(stream.fileno(), _LENGTH.size))
    return _read(stream.fileno(), length)


def pack(record: Record) -> bytes:
    table = to_table([record])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def unpack(data: bytes) -> Record:
    with pa.ipc.open_stream(data) as reader:
        return from_table(reader.read_all())[0]


def _read(handle: int, count: int) -> bytes:
    parts = []
    while count:
        part = os.read(handle, min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
