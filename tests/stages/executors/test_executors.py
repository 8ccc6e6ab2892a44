"""A data set through both executors: the same bytes, also after a run that was stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.lint import lint
from pipelines.run import run
from stages.storage.store import Store
from tests.pipelines.helpers import DEMO, config, digests, hears_ctrl_c


@pytest.fixture(scope="module")
def expected(portraits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """File name → digest, of an uninterrupted run on the inline executor."""
    output = tmp_path_factory.mktemp("expected")
    run(config(portraits, output, "shard_size=2"))
    return digests(output)


@pytest.mark.slow
def test_ray_writes_the_bytes_of_inline(
    portraits: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    advanced: list[int] = []
    ledger = run(config(portraits, tmp_path, "shard_size=2", "executor=ray"), advanced.append)
    assert digests(tmp_path) == expected
    assert ledger.inputs == sum(advanced) == 8


def _stopped(command: list[str], shards: Path, how: signal.Signals) -> tuple[int, str]:
    """Runs `command` and sends it the signal `how` when its first shard is committed. Returns its
    exit status and standard error.
    """
    driver = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hears_ctrl_c,
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


@pytest.mark.slow
# Ray's driver is killed by `make chaos`.
@pytest.mark.parametrize(("executor", "how"), [("inline", signal.SIGKILL), ("ray", signal.SIGINT)])
def test_a_stopped_and_resumed_run_writes_the_bytes_of_an_uninterrupted_one(
    executor: str, how: signal.Signals, portraits: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    overrides = [
        f"source.path={portraits}",
        f"output={tmp_path}",
        "shard_size=2",
        "threads=1",
        f"executor={executor}",
    ]
    command = [sys.executable, "-m", "pipelines.cli", "run", "--config", DEMO, *overrides]
    shards = tmp_path / "shards"
    for _ in range(3):  # the run may end before the signal arrives
        shutil.rmtree(tmp_path)
        code, errors = _stopped(command, shards, how)
        if len(list(shards.glob("*.json"))) < 4:
            break
    else:
        pytest.fail("the run ended before it was stopped, three times")
    if how is signal.SIGINT:
        assert code == 130, errors
        assert "The same command continues" in errors and "Traceback" not in errors
        assert not (tmp_path / "run.lock").exists()
    else:
        assert code == -signal.SIGKILL, "the run ended before it could be killed"
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert digests(tmp_path) == expected
    assert list(lint(Store(str(tmp_path)))) == []
    assert not [path.name for path in shards.iterdir() if ".tmp-" in path.name]
