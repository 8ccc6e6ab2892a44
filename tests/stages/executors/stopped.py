"""A run in a process of its own, and a signal that stops it after its first shard."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pipelines.helpers import DEMO, restore_sigint


def arguments(portraits: Path, output: Path, executor: str) -> list[str]:
    """Of the command that makes the portraits a data set of four shards."""
    overrides = [
        f"source.path={portraits}",
        f"output={output}",
        "shard_size=2",
        "threads=1",
        f"executor={executor}",
    ]
    return ["run", "--config", DEMO, *overrides]


def stopped(given: list[str], output: Path, how: signal.Signals) -> tuple[int, str]:
    """Runs the command until it is stopped with some of its four shards committed; returns its exit
    status and standard error.
    """
    shards = output / "shards"
    for _ in range(3):  # the run may end before the signal arrives
        shutil.rmtree(output)
        code, errors = _stopped(given, shards, how)
        if len(list(shards.glob("*.json"))) < 4:
            return code, errors
    pytest.fail("three times the run ended before it was stopped")


def _stopped(given: list[str], shards: Path, how: signal.Signals) -> tuple[int, str]:
    driver = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *given],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=restore_sigint,
    )
    try:
        while driver.poll() is None and not list(shards.glob("*.json")):
            time.sleep(0.02)
    finally:
        if how is signal.SIGINT:
            os.killpg(driver.pid, how)  # as a terminal does: to every process of the group
        else:
            driver.kill()
    _, errors = driver.communicate(timeout=60)
    return driver.returncode, errors
