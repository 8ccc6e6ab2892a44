"""The command line: help, retry, dry runs, and two runs at the same time."""

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

OVERRIDES = ("shard_size=4", "threads=1", "executor=inline")


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


def test_help_lists_the_commands_without_importing_large_libraries() -> None:
    code = "import sys, pipelines.cli; print({'torch', 'ray', 'cv2', 'pyarrow'} & set(sys.modules))"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == "set()"
    help_text = call("--help").output
    assert all(
        name in help_text
        for name in ("run", "retry", "status", "lint", "info", "report", "export-json")
    )


def test_retry_processes_inputs_that_failed_with_the_reason_and_no_others(
    photos: Path, portraits: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert (
        call("run", "-c", DEMO, f"source.path={photos}", f"output={output}", *OVERRIDES).exit_code
        == 0
    )
    (photos / "page.jpg").write_bytes(sorted(portraits.glob("*.jpg"))[2].read_bytes())

    unknown = call("retry", output, "--reason", "timeout")
    assert unknown.exit_code == 2 and "Reasons: not_an_image" in unknown.stderr
    before = digests(output)
    dry = call("retry", output, "--reason", "not_an_image", "--dry-run")
    assert dry.exit_code == 0 and "inputs to retry (not_an_image)" in dry.output
    assert digests(output) == before
    result = call("retry", output, "--reason", "not_an_image")
    assert result.exit_code == 0 and "3 written" in result.output and "0 failed" in result.output
    assert call("lint", output).exit_code == 0
    assert "1 of 1 planned shards are committed" in call("status", output).output


def test_a_second_run_at_the_same_time_is_an_error_and_writes_nothing(
    photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with RunLock(Store(str(output))):
        result = call("run", "-c", DEMO, f"source.path={photos}", f"output={output}", *OVERRIDES)
        assert result.exit_code == 2 and "is being written by process" in result.stderr
        assert [path.name for path in output.iterdir()] == ["run.lock"]


@pytest.mark.parametrize("name", ["status", "lint", "report", "info"])
def test_a_folder_that_is_not_a_data_set_is_an_error(name: str, tmp_path: Path) -> None:
    result = call(name, tmp_path)
    assert result.exit_code == 2 and "run" in result.stderr and "Traceback" not in result.stderr
