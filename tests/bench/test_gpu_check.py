"""bench.gpu_check: all checks pass on a CPU at small sizes; what is missing gets a row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench.gpu.checks import CHECKS, measured
from bench.gpu.common import Check, MissingError, Setting
from bench.gpu.training import TOLERANCES, forget_precision
from bench.gpu_check import in_process, main, row_of, table
from bench.synthetic_person import write_people
from configs.schema import DatasetConfig
from stages.backends.weights import Weights

ROOT = Path(__file__).parents[2]
_SHORT = ("device", "parse", "faces", "step")


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Checks start processes there. Other tests of this process may train in another precision."""
    monkeypatch.chdir(ROOT)
    yield
    forget_precision()


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """The checks download nothing, so the weights are fetched here."""
    config = DatasetConfig()
    for name in (config.detect.weights, config.embed.weights, config.parse.weights, "clip_bpe"):
        Weights().fetch(name)
    return Setting(device="cpu", tiny=True, folder=tmp_path_factory.mktemp("gpu-check"))


@pytest.mark.parametrize(
    "name",
    [name if name in _SHORT else pytest.param(name, marks=pytest.mark.thorough) for name in CHECKS],
)
def test_a_check_passes_on_the_cpu(name: str, setting: Setting) -> None:
    row = measured(name, setting)
    assert (row["status"], row["detail"]) == ("passed", "")
    assert row["values"]


def test_a_difference_outside_its_tolerance_fails(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 differs from float32 by percents, so it fails with the tolerance of float32."""
    monkeypatch.setitem(TOLERANCES, "bf16", TOLERANCES["no"])
    row = measured("step", setting)
    assert row["status"] == "failed"
    assert row["detail"] == "bf16: gradients differ by more than 0.001 from the CPU's"
    assert row["values"]["bf16"]["gradients"] > 0.001


def test_what_is_missing_gets_a_row(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHECKS, "device", Check(run=CHECKS["device"].run, packages=("no_such",)))
    assert measured("device", setting)["detail"] == "packages no_such"

    def lacks(_: Setting) -> dict[str, object]:
        raise MissingError("weights of mine: fetch them")

    monkeypatch.setitem(CHECKS, "device", Check(run=lacks, packages=()))
    row = measured("device", setting)
    assert (row["status"], row["detail"]) == ("missing", "weights of mine: fetch them")


def test_a_value_that_is_not_finite_fails(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Check(run=lambda _: {"bf16": {"loss": float("nan")}}, packages=())
    monkeypatch.setitem(CHECKS, "device", check)
    row = measured("device", setting)
    assert (row["status"], row["detail"]) == ("failed", "a value isn't finite")


def test_the_exit_status_is_1_after_a_check_that_took_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Check(run=CHECKS["step"].run, packages=(), seconds=1)
    monkeypatch.setitem(CHECKS, "step", slow)
    output = tmp_path / "gpu.json"
    options = ["--output", str(output), "--only", "step", "--device", "cpu", "--tiny"]
    assert main([*options, "--folder", str(tmp_path / "work")]) == 1
    (row,) = json.loads(output.read_text()).values()
    assert (row["status"], row["detail"]) == ("failed", "stopped after 1 s")
    assert "| step | failed: stopped after 1 s |" in output.with_suffix(".md").read_text()


def test_the_row_of_a_process_that_fails_has_all_its_errors(setting: Setting) -> None:
    row = in_process("device", replace(setting, device="none"))
    assert row["status"] == "failed" and row["detail"].startswith("exit 2: ")
    assert "invalid choice: 'none'" in row["detail"]
    assert row["errors"].startswith("usage: ")
    assert "usage: " not in table({"device": {**row, "seconds": 0}})


def test_the_row_of_a_check_has_the_error_of_a_command_that_it_started(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def start(_: Setting) -> dict[str, object]:
        subprocess.run([sys.executable, "-c", "import no_such_module"], check=True)
        return {}

    monkeypatch.setitem(CHECKS, "device", Check(run=start, packages=()))
    assert main(["--one", "device"]) == 1
    output, errors = capfd.readouterr()
    assert "CalledProcessError" not in errors
    row = row_of(output, errors, 1)
    assert row["status"] == "missing"
    assert row["detail"] == "ModuleNotFoundError: No module named 'no_such_module'"
    row = row_of(output, errors.replace("ModuleNotFoundError", "OSError"), 1)
    assert row["status"] == "failed"
    assert "OSError: No module named 'no_such_module'" in row["detail"]


def test_another_number_of_people_is_another_data_set(tmp_path: Path) -> None:
    few, more = (write_people(tmp_path, count) for count in (1, 2))
    assert few != more and write_people(tmp_path, 1) == few


def test_an_old_python_says_so() -> None:
    code = "import runpy, sys; sys.version_info = (3, 10, 12); runpy.run_module('bench.gpu_check')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Python 3.10.12 is too old: 3.11 or newer is needed.")
    assert "Traceback" not in done.stderr


def test_without_a_gpu_it_says_so_and_fails(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "bench.gpu_check", "--output", str(output)]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=hidden)
    assert done.returncode == 2
    assert done.stderr.startswith("no GPU: torch ")
    assert not output.exists()


def test_the_command_writes_json_and_a_table(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "bench.gpu_check", "--output", str(output), "--only", "device"]
    command += ["--device", "cpu", "--tiny", "--folder", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())
    assert output.with_suffix(".md").read_text() == table(rows)
    assert rows["device"]["status"] == "passed"
    assert "| device | passed |" in table(rows)
