"""The child process of stages/executors/isolate.py: `python -m stages.executors.child`.

Its standard input gives first how to build the stages, then one record after another.
"""

from __future__ import annotations

import os
import sys
from typing import IO

from configs.errors import PipelineError
from stages.base import run_chain
from stages.executors.job import ChainReference
from stages.executors.messages import ERROR, READY, STAGE, pack, receive, send, unpack


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    # what a library prints must not mix with the answers
    os.dup2(2, 1)
    try:
        _serve(sys.stdin.buffer, answers)
    except PipelineError as error:
        send(answers, ERROR + str(error).encode())


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    from stages.backends.runtime import pin_threads

    function, text, names, threads = (receive(requests).decode() for _ in range(4))
    pin_threads(int(threads))
    chain = ChainReference(function, text).build()
    stages = [stage for stage in chain if stage.name in names.split(",")]
    for stage in stages:
        stage.setup()
    send(answers, READY)
    while True:
        try:
            remaining_stages = frozenset(receive(requests).decode().split(","))
            record = unpack(receive(requests))
        except EOFError:
            return
        finished = run_chain(
            stages,
            [record],
            remaining_stages=[remaining_stages],
            entering=lambda stage: send(answers, STAGE + stage.encode()),
        )
        send(answers, pack(finished[0]))


if __name__ == "__main__":
    main()
