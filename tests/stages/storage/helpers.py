"""Helpers for tests of storage."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from configs.schema import DatasetConfig
from tests.pipelines.helpers import DEMO, NO_RULES, config
from tests.pipelines.stub_chain import Scene

_SETTINGS: Final = ("shard_size=1", *NO_RULES)

# a program that holds the lock of the output in its argument until it is killed
HOLDER = """
import sys, time
from stages.storage.lock import RunLock
from stages.storage.store import Store
with RunLock(Store(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""

# runs the command line with stages that need no model (tests/pipelines/stub_chain.py)
_COMMAND_LINE = """
from functools import partial
import pipelines.run
from pipelines.cli import app
from tests.pipelines.stub_chain import stub_chain
pipelines.run.plan_job = partial(pipelines.run.plan_job, chain=stub_chain)
app()
"""


def write_scenes(folder: Path) -> None:
    """Writes two inputs for `stub_chain`, as large as photographs."""
    for person, size in (("ann", 300_000), ("bob", 200_000)):
        (folder / f"{person}.jpg").write_bytes(Scene(person=person).encode().ljust(size))


def settings(source: Path | str, output: Path | str, *overrides: str) -> DatasetConfig:
    """Returns the configuration of a run that makes a shard of each input."""
    return config(source, output, *_SETTINGS, *overrides)


def command(source: Path | str, output: str, *overrides: str) -> list[str]:
    """Returns the command of a run with these settings and `stub_chain`."""
    arguments = [f"source.path={source}", f"output={output}", *_SETTINGS, "threads=1"]
    run_command = [sys.executable, "-c", _COMMAND_LINE, "run", "--config", DEMO]
    return [*run_command, *arguments, *overrides]
