"""Isolation: one record at a time in a child process, for a shard that has killed its workers.

The child (stages/executors/child.py) runs the same stages. If it dies (a segfault in a decoder, out
of memory) or takes longer than `stuck_after`, the record it was processing fails (`killed_worker`,
`timed_out`), and the next record gets a new child.
"""

from __future__ import annotations

import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import IO

from configs.errors import PipelineError
from stages.base import Failed, StageNames, reject
from stages.executors.job import ChainReference
from stages.executors.messages import ERROR, READY, STAGE, pack, receive, send, unpack
from stages.record import Record


class Child:
    """Context manager of a process that runs stages. The process starts with the first record.

    names: the stages of `chain` to run, in order. threads: of each model. stuck_after: seconds for
    one record; loading the weights doesn't count.
    """

    def __init__(
        self, chain: ChainReference, names: Sequence[str], threads: int, stuck_after: float
    ) -> None:
        self._chain, self._names = chain, names
        self._threads, self._stuck_after = threads, stuck_after
        self._ready = False  # the process has loaded its weights
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    @property
    def pid(self) -> int:
        """Of the running process; 0 if there is none."""
        return self._process.pid if self._process else 0

    def run(self, record: Record, remaining_stages: StageNames) -> Record:
        """Runs the record through the stages it needs. Returns it as failed if the process died or
        took too long.

        Raises PipelineError for an error that isn't the record's, such as a server that is gone.
        """
        names = [name for name in self._names if name in remaining_stages]
        if not record.ok or not names:
            return record
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        stage = names[0]
        try:
            send(process.stdin, ",".join(names).encode())
            send(process.stdin, pack(record))
            if not self._ready and _receive(process.stdout) != READY:
                raise EOFError
            self._ready = True
            while select.select([process.stdout], [], [], self._stuck_after)[0]:
                message = _receive(process.stdout)
                if not message.startswith(STAGE):
                    return unpack(message)
                stage = message[len(STAGE) :].decode()
        except (EOFError, BrokenPipeError):
            code = self._end()
            cause = f"signal {-code}" if code < 0 else f"exit status {code}"
            return reject(record, Failed("killed_worker", f"its process ended with {cause}"), stage)
        process.kill()
        self._end()
        return reject(record, Failed("timed_out", f"no answer in {self._stuck_after:g} s"), stage)

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "stages.executors.child"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        chain, names = self._chain, ",".join(self._names)
        for text in (chain.function, chain.text, names, str(self._threads)):
            send(self._process.stdin, text.encode())
        return self._process

    def _end(self) -> int:
        """Ends the process, if there is one; returns its exit status."""
        if self._process is None:
            return 0
        process, self._process, self._ready = self._process, None, False
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue  # the process has ended already
        try:
            return process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def run_isolated(
    child: Child,
    records: Sequence[Record],
    remaining_stages: Sequence[StageNames],
    advance: Callable[[int], None] | None = None,
) -> list[Record]:
    """Same as stages.base.run_chain, but no record can end this process."""
    finished = []
    for record, names in zip(records, remaining_stages, strict=True):
        finished.append(child.run(record, names))
        if advance is not None:
            advance(1)
    return finished


def _receive(stream: IO[bytes]) -> bytes:
    """Returns the child's next message. Raises PipelineError if it is one, EOFError if the child
    has ended.
    """
    message = receive(stream)
    if message.startswith(ERROR):
        raise PipelineError(message[len(ERROR) :].decode())
    return message
