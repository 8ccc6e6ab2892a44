"""One picture at a time in a child process, for a shard that has killed its worker more than once.

The child runs the same stages. When it dies (a segfault in a decoder, out of memory) or takes
longer than `stuck_after`, the picture it had in hand is recorded as failed (`killed_worker`,
`timed_out`), a new child is started, and the rest goes on. Records travel as Arrow over the child's
stdin and stdout, each message behind its length.
"""

from __future__ import annotations

import importlib
import os
import select
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import IO, Any, Final

import pyarrow as pa

from configs.errors import PipelineError
from configs.load import load_text, to_yaml
from configs.schema import DatasetConfig
from stages.base import Failed, Stage, StageNames, reject, run_chain
from stages.record import Record, from_table, to_table

_LENGTH = struct.Struct("<Q")
_READY = b"ready"
# begins what the child says on entering a stage; an answer's first byte is another
_AT: Final = b"@"
# begins an error that is no picture's fault, such as a caption server that is gone
_FAULT: Final = b"!"
_CHAIN: Final = "pipelines.chain:build_chain"


class Child:
    """A process that runs the configured stages, started when it is first needed.

    chain: module:function of the Chain that builds them.
    """

    def __init__(
        self, config: DatasetConfig, names: Sequence[str], threads: int, chain: str = _CHAIN
    ) -> None:
        self._hello = [
            text.encode() for text in (to_yaml(config), ",".join(names), str(threads), chain)
        ]
        self._names = names
        self._limit = config.stuck_after
        self._ready = False  # its models are loaded; until then no clock runs
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def pid(self) -> int:
        """Of the running process; 0 before the first record."""
        return self._process.pid if self._process else 0

    def run(self, record: Record, remaining_stages: StageNames) -> Record:
        """The record through the stages it needs; failed where the child died of it or was too long
        over it.

        Raises PipelineError for what is no record's fault.
        """
        names = [name for name in self._names if name in remaining_stages]
        if not record.ok or not names:
            return record
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        stage = names[0]
        try:
            _send(process.stdin, ",".join(names).encode())
            _send(process.stdin, _pack(record))
            if not self._ready and _heard(process.stdout) != _READY:
                raise EOFError
            self._ready = True
            while select.select([process.stdout], [], [], self._limit)[0]:
                answer = _heard(process.stdout)
                if not answer.startswith(_AT):
                    return _unpack(answer)
                stage = answer[len(_AT) :].decode()
        except (EOFError, BrokenPipeError):
            code = self._end()
            cause = f"signal {-code}" if code < 0 else f"exit status {code}"
            return reject(record, Failed("killed_worker", f"its process ended with {cause}"), stage)
        process.kill()
        self._end()
        return reject(record, Failed("timed_out", f"no answer in {self._limit:g} s"), stage)

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "stages.executors.isolate"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        for message in self._hello:
            _send(self._process.stdin, message)
        return self._process

    def _end(self) -> int:
        if self._process is None:
            return 0
        process, self._process, self._ready = self._process, None, False
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue  # it is gone already, which is what we want
        try:
            return process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def run_isolated(
    config: DatasetConfig,
    stages: Sequence[Stage],
    records: Sequence[Record],
    remaining_stages: Sequence[StageNames],
    threads: int,
    advance: Callable[[int], None] | None = None,
    chain: str = _CHAIN,
) -> list[Record]:
    """As stages.base.run_chain, but no picture can kill this process."""
    done = []
    with Child(config, [stage.name for stage in stages], threads, chain) as child:
        for record, needs in zip(records, remaining_stages, strict=True):
            done.append(child.run(record, needs))
            if advance is not None:
                advance(1)
    return done


def _heard(stream: IO[bytes]) -> bytes:
    """The child's next message. Raises PipelineError where it tells of one, EOFError where it is
    gone.
    """
    answer = _receive(stream)
    if answer.startswith(_FAULT):
        raise PipelineError(answer[len(_FAULT) :].decode())
    return answer


def _pack(record: Record) -> bytes:
    table = to_table([record])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _unpack(data: bytes) -> Record:
    with pa.ipc.open_stream(data) as reader:
        return from_table(reader.read_all())[0]


def _send(stream: IO[bytes], data: bytes) -> None:
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes:
    """The next message, and not a byte more: what waits behind it must be seen by `select`. Raises
    EOFError.
    """
    (length,) = _LENGTH.unpack(_read(stream.fileno(), _LENGTH.size))
    return _read(stream.fileno(), length)


def _read(handle: int, count: int) -> bytes:
    parts = []
    while count:
        part = os.read(handle, min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    try:
        _serve(sys.stdin.buffer, answers)
    except PipelineError as error:
        _send(answers, _FAULT + str(error).encode())


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    from stages.backends.runtime import pin_threads

    config = load_text(DatasetConfig, _receive(requests).decode())
    names = _receive(requests).decode().split(",")
    pin_threads(int(_receive(requests)))
    module, _, function = _receive(requests).decode().partition(":")
    chain: Any = getattr(importlib.import_module(module), function)
    stages = [stage for stage in chain(config) if stage.name in names]
    for stage in stages:
        stage.setup()
    _send(answers, _READY)
    while True:
        try:
            remaining_stages = frozenset(_receive(requests).decode().split(","))
            record = _unpack(_receive(requests))
        except EOFError:
            return
        done = run_chain(
            stages,
            [record],
            remaining_stages=[remaining_stages],
            entering=lambda stage: _send(answers, _AT + stage.encode()),
        )
        _send(answers, _pack(done[0]))


if __name__ == "__main__":
    _main()
