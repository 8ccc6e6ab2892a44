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


def test_an_output_with_files_of_the_user_is_refused_and_unchanged(
    photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    for name in ("README.md", "config.yaml"):
        (output / name).write_text("the user's\n")
    result = call("run", "-c", DEMO, f"source.path={photos}", f"output={output}", *OVERRIDES)
    assert result.exit_code == 2
    assert "holds 'README.md', and no data set" in result.stderr
    assert {path.name: path.read_text() for path in output.iterdir()} == {
        "README.md": "the user's\n",
        "config.yaml": "the user's\n",
    }


@pytest.mark.parametrize(("source", "output"), [("in", "in/out"), ("a/in", "a"), ("in", "in")])
def test_source_and_output_inside_each_other_are_refused(
    tmp_path: Path, source: str, output: str
) -> None:
    folder = tmp_path / source
    folder.mkdir(parents=True)
    if source == output:
        (folder / "plan.parquet").touch()  # as if it were a data set
    paths = f"source.path={folder}", f"output={tmp_path / output}"
    result = call("run", "-c", DEMO, *paths, *OVERRIDES)
    assert result.exit_code == 2
    expected = "no data set" if output == "a" else "one is inside the other"
    assert expected in result.stderr


def test_a_run_without_a_sample_exits_with_an_error_that_names_the_reasons(tmp_path: Path) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "page.jpg").write_bytes(b"<!doctype html>")
    (folder / "empty.jpg").touch()
    result = call("run", "-c", DEMO, f"source.path={folder}", f"output={output}", *OVERRIDES)
    assert result.exit_code == 2
    assert "none of 2 inputs became a sample" in result.stderr
    assert "not_an_image 1" in result.stderr and "empty_file 1" in result.stderr
    assert (output / "report/index.html").exists()


def test_another_shard_size_is_said_to_hold_for_new_shards_only(
    photos: Path, tmp_path: Path
) -> None:
    paths = f"source.path={photos}", f"output={tmp_path / 'out'}"
    assert "shard_size was" not in call("run", "-c", DEMO, *paths, *OVERRIDES).stdout
    result = call("run", "-c", DEMO, *paths, *OVERRIDES, "shard_size=2", "--dry-run")
    assert "shard_size was 4; 2 holds for new shards only" in result.stdout
    (tmp_path / "out/config.yaml").write_text("a: [")
    assert call("run", "-c", DEMO, *paths, *OVERRIDES).exit_code == 0, "it is written again"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("detect.weights=w600k_mbf", "these weights are for embed. Known for detect: det_10g"),
        ("embed.weights=clip_bpe", "these weights are for no stage"),
        ("parse.backend=nope", "parse.backend='nope': no such backend. Known: bisenet"),
    ],
)
def test_a_setting_that_fits_no_stage_is_an_error_of_a_dry_run_too(
    photos: Path, tmp_path: Path, setting: str, message: str
) -> None:
    paths = f"source.path={photos}", f"output={tmp_path / 'out'}"
    result = call("run", "-c", DEMO, *paths, *OVERRIDES, setting, "--dry-run")
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("output=/proc/none/out", "/proc/none/out/run.lock"),
        ("weights.cache=/proc/none", "the cache of weights, /proc/none, can't be written"),
    ],
)
def test_a_folder_that_cannot_be_made_is_an_error(
    photos: Path, tmp_path: Path, setting: str, message: str
) -> None:
    paths = f"source.path={photos}", f"output={tmp_path / 'out'}"
    result = call("run", "-c", DEMO, *paths, *OVERRIDES, setting)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
