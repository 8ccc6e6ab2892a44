"""The command `caption-servers` in a process of its own."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Final

import psutil

from tests.pipelines.helpers import restore_sigint

TRANSFORMERS: Final = ("--engine", "transformers", "--server-args", "--dtype float32")


class Fleet:
    """The command, which may still be starting. errors: what it writes to standard error."""

    def __init__(self, process: subprocess.Popen[str], errors: Path) -> None:
        self.process, self.errors = process, errors

    @cached_property
    def line(self) -> str:
        """What the command prints when all servers are ready: settings for a run. Waits for it."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()  # the command has a time limit for each server
        assert line, self.errors.read_text()
        return line

    @property
    def settings(self) -> dict[str, str]:
        """Name → value of each setting in `line`."""
        return dict(setting.split("=", 1) for setting in shlex.split(self.line))

    @property
    def base_urls(self) -> list[str]:
        return self.settings["caption.openai.base_url"].split(",")

    def processes(self) -> dict[str, int]:
        """Returns base URL → the process that was started last for it."""
        assert self.line
        log = self.errors.read_text()
        started = dict(re.findall(r"(server \d+) of \d+: process (\d+) on", log))
        ready = dict(re.findall(r"(server \d+) of \d+: ready after .* s, (\S+)", log))
        return {url: int(started[name]) for name, url in ready.items()}

    def starts(self, base_url: str) -> int:
        """Returns how often the server became ready."""
        return self.errors.read_text().count(f" s, {base_url}\n")


@contextmanager
def caption_servers(model: Path | str, errors: Path, *arguments: str) -> Iterator[Fleet]:
    """Starts two servers with the command, and doesn't wait until they are ready.

    errors: a file for standard error. arguments: of the command.
    """
    command = [sys.executable, "-m", "pipelines.cli", "caption-servers", "--model", str(model)]
    command += ["--servers", "2", "--cpus-each", "0.1", "--logs", f"{errors}.logs", *arguments]
    with errors.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=restore_sigint,
        )
    try:
        yield Fleet(process, errors)
    finally:
        process.terminate()
        process.communicate(timeout=60)


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s"
        time.sleep(0.1)


def mentioning(text: str | Path) -> list[psutil.Process]:
    """Returns the processes of this machine whose command line contains a text."""
    processes = []
    for process in psutil.process_iter():
        try:
            if str(text) in " ".join(process.cmdline()):
                processes.append(process)
        except psutil.Error:
            continue
    return processes
