"""Runs the pipeline in a separate process, and stops it with a signal after its first shard."""

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

FOUR_SHARDS = ("shard_size=2", "parse.size=256", "rules.max_occlusion=0")
"""Settings of a data set of eight portraits. Parsing at this size takes a quarter of the time, and
shows too little of a face for the rule.
"""


def arguments(portraits: Path, output: Path, executor: str) -> list[str]:
    """Returns the arguments of the command that makes a data set of four shards."""
    overrides = [
        f"source.path={portraits}",
        f"output={output}",
        "threads=1",
        f"executor={executor}",
        "ray.workers=1",
        *FOUR_SHARDS,
    ]
    return ["run", "--config", DEMO, *overrides]


def stopped(command: list[str], output: Path, how: signal.Signals) -> tuple[int, str]:
    """Runs the command and stops it while fewer than four shards are committed. Returns its exit
    status and standard error.

    command: as `arguments` returns it. how: the signal.
    """
    shards = output / "shards"
    for _ in range(3):  # the run may end before the signal arrives
        shutil.rmtree(output)
        code, errors = _stopped(command, shards, how)
        if len(list(shards.glob("*.json"))) < 4:
            return code, errors
    pytest.fail("the run ended before it was stopped, three times")


def _stopped(command: list[str], shards: Path, how: signal.Signals) -> tuple[int, str]:
    driver = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *command],
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
            os.killpg(driver.pid, how)  # as a terminal does, to all processes of the group
        else:
            driver.kill()
    _, errors = driver.communicate(timeout=60)
    return driver.returncode, errors
