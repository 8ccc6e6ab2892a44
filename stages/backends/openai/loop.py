"""An event loop in a thread of its own.

Connections stay open between calls, and the caller's thread may already run a loop, as in a
notebook.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, TypeVar

_T = TypeVar("_T")
_JOIN: Final = 5.0  # seconds that the end of the program waits for a thread
_running: Final[dict[threading.Thread, LoopThread]] = {}


class LoopThread:
    """Runs coroutines in a thread until `stop`. Then, in the thread, the tasks that are left are
    cancelled, `closing` is awaited, and the loop is closed. The end of the program stops it too.
    """

    def __init__(self, closing: Callable[[], Awaitable[None]]) -> None:
        self._loop, self._stopped = asyncio.new_event_loop(), asyncio.Event()
        thread = threading.Thread(target=self._serve, args=(closing,), name="openai", daemon=True)
        _running[thread] = self
        thread.start()

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Returns the coroutine's result, or raises what it raises."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def stop(self) -> None:
        """Lets the thread end, without waiting for it: a garbage collection may call this in any
        thread, this one included. Further calls have no effect.
        """
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._stopped.set)

    def _serve(self, closing: Callable[[], Awaitable[None]]) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._until_stopped(closing))
        finally:
            self._loop.close()
            _running.pop(threading.current_thread(), None)

    async def _until_stopped(self, closing: Callable[[], Awaitable[None]]) -> None:
        await self._stopped.wait()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await closing()
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()


@atexit.register
def _stop_all() -> None:
    threads = dict(_running)
    for each in threads.values():
        each.stop()
    for thread in threads:
        thread.join(_JOIN)
