"""A process that ends when its owner does, also if the owner is killed.

`python owned.py COMMAND…` starts a watcher, `python owned.py`, and then becomes COMMAND. Both are
in a process group of their own. The watcher waits for the end of standard input, a pipe of which
only the owner has the other end, and sends SIGKILL to the group: to COMMAND and to all that it has
started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO


class OwnedProcess:
    """A command in a process group of its own, without standard input.

    env: its environment; None: that of this process. output: where it writes, errors too; None:
    where this process does.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        output: IO[bytes] | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Of the command, and of its group."""
        return self._process.pid

    def poll(self) -> int | None:
        """Returns the exit status of the command, negative for a signal; None while it runs."""
        return self._process.poll()

    def send_signal(self, number: int) -> None:
        """Sends a signal to the whole group, as a terminal does."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def end(self, grace: float) -> int:
        """Ends the command with SIGTERM and, after `grace` seconds, with SIGKILL, then what is left
        of its group. Returns the exit status. Does nothing more if it is called again.
        """
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            return self._process.wait()
        if self.poll() is None:
            self.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace)
        # The watcher is in the group, so that no other group can have this number yet.
        self.send_signal(signal.SIGKILL)
        self._process.stdin.close()
        return self._process.wait()


def main() -> None:
    command = sys.argv[1:]
    if not command:
        _watch()
    if os.fork() == 0:
        # Not a child of the command, which may wait for all of its children.
        if os.fork() == 0:
            _become_watcher()
        os._exit(0)
    os.wait()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        os.execvp(command[0], command)  # noqa: S606 - there is no shell to quote for
    except OSError as error:
        sys.stderr.write(f"{command[0]} can't be started: {error.strerror}\n")
        sys.exit(127)


def _become_watcher() -> None:
    """Starts this program again without a command, so that lists of processes don't show the
    command twice. Only SIGKILL ends it.
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)  # whoever reads the command's output sees its end
    os.execv(sys.executable, [sys.executable, "-I", "-S", __file__])  # noqa: S606


def _watch() -> None:
    """Waits for the end of standard input, then kills this process's group."""
    while os.read(0, 1):
        continue
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
