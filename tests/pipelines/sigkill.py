"""A real SIGKILL at a chosen moment: a function runs in a child process, which kills itself."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from stages.storage.store import Store
from tests.pipelines.stub_chain import StubCaption

# Children are forked from a server process that has imported everything and runs no threads.
_CHILDREN = multiprocessing.get_context("forkserver")
_CHILDREN.set_forkserver_preload(
    [
        "tests.pipelines.incremental",
        # what a run imports when it needs it
        "fsspec.implementations.local",
        "pandas",
        "pipelines.sources.files",
    ]
)


def killed(
    moment: int,
    errors: Path,
    function: Callable[..., object],
    *arguments: object,
    children: Any = _CHILDREN,
) -> bool:
    """Calls `function` in a child process that SIGKILLs itself at moment number `moment`, from 1.

    A moment is before a file of the output is written, when it is written but not yet there under
    its name, after that; before and after one is removed or moved; and before records are
    captioned. children: the context of multiprocessing that starts the child. Returns False where
    the function ended before that. Raises AssertionError, with what the child wrote to the file
    `errors`, where it failed.
    """
    child = children.Process(target=_run, args=(moment, errors, function, arguments))
    child.start()
    child.join(60)
    assert child.exitcode in (0, -signal.SIGKILL), errors.read_text()
    return child.exitcode != 0


def _run(
    moment: int, errors: Path, function: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    try:
        _die_at(moment)
        function(*arguments)
    except BaseException:
        errors.write_text(traceback.format_exc())
        raise


def _die_at(moment: int) -> None:
    left = moment

    def count() -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            count()
            answer = real(*arguments)
            count()
            return answer

        return counted

    write = Store.writer

    @contextmanager
    def writer(self: Store, name: str) -> Iterator[IO[bytes]]:
        count()
        with write(self, name) as stream:
            yield stream
            stream.flush()
            count()
        count()

    caption = StubCaption.process

    def process(self: StubCaption, records: list[Any]) -> list[Any]:
        count()
        return caption(self, records)

    os.fsync = lambda fd: None  # only a machine that loses power loses what was written
    Store.writer = writer  # type: ignore[method-assign]
    Store.remove = around(Store.remove)  # type: ignore[method-assign]
    Store.move = around(Store.move)  # type: ignore[method-assign]
    StubCaption.process = process  # type: ignore[method-assign]
