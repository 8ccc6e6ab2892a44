"""The command: its help, retry, dry runs, and a second run at the same time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipelines.cli import app
from stages.storage.lock import RunLock
from stages.storage.store import Store
from tests.pipelines.helpers import DEMO, digests

GIVEN = ("shard_size=4", "threads=1", "executor=inline")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def photos(portraits: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for path in sorted(portraits.glob("*.jpg"))[:2]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "page.jpg").write_bytes(b"<!doctype html>")
    return folder


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, pipelines.cli; print({'torch', 'ray', 'cv2', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    said = call("--help").output
    assert all(
        name in said for name in ("run", "retry", "status", "lint", "info", "report", "export-json")
    )


def test_retry_takes_up_what_failed_and_nothing_else(
    photos: Path, portraits: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert (
        call("run", "-c", DEMO, f"source.path={photos}", f"output={output}", *GIVEN).exit_code == 0
    )
    (photos / "page.jpg").write_bytes(sorted(portraits.glob("*.jpg"))[2].read_bytes())

    unknown = call("retry", output, "--reason", "timeout")
    assert unknown.exit_code == 2 and "Reasons: not_an_image" in unknown.stderr
    before = digests(output)
    dry = call("retry", output, "--reason", "not_an_image", "--dry-run")
    assert dry.exit_code == 0 and "tried again (not_an_image)" in dry.output
    assert digests(output) == before
    done = call("retry", output, "--reason", "not_an_image")
    assert done.exit_code == 0 and "3 written" in done.output and "0 failed" in done.output
    assert call("lint", output).exit_code == 0
    assert "1 of 1 planned shards are committed" in call("status", output).output


def test_a_second_run_at_the_same_time_is_refused_and_writes_nothing(
    photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with RunLock(Store(str(output))):
        done = call("run", "-c", DEMO, f"source.path={photos}", f"output={output}", *GIVEN)
        assert done.exit_code == 2 and "is being written by process" in done.stderr
        assert [path.name for path in output.iterdir()] == ["run.lock"]


@pytest.mark.parametrize("name", ["status", "lint", "report", "info"])
def test_what_is_no_data_set_is_said(name: str, tmp_path: Path) -> None:
    done = call(name, tmp_path)
    assert done.exit_code == 2 and "run" in done.stderr and "Traceback" not in done.stderr
