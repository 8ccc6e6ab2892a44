"""The command line, run in a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.chaos.cluster import ROOT, TOKEN
from tests.pipelines.helpers import DEMO

CLI = [sys.executable, "-m", "pipelines.cli"]
ENVIRONMENT = {**os.environ, **TOKEN}


def run_command(photos: Path, output: Path, *more: str) -> list[str]:
    """Returns the arguments of the command line that makes the data set."""
    settings = [f"source.path={photos}", f"output={output}", "shard_size=3", "threads=1", *more]
    return ["run", "--config", DEMO, *settings]


def output_of(arguments: list[str], preexec: Callable[[], None] | None = None) -> tuple[int, str]:
    """Runs the command line. Returns its exit status and all that it prints. preexec: runs in the
    process first.
    """
    process = subprocess.run(
        [*CLI, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=preexec,
    )
    return process.returncode, process.stdout


def succeed(arguments: list[str]) -> None:
    """Runs the command line; raises RuntimeError if it fails."""
    code, text = output_of(arguments)
    if code:
        raise RuntimeError(f"{' '.join(arguments)} exited {code}:\n{text[-2000:]}")
