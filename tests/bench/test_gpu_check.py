"""bench.gpu_check: all checks pass on a CPU at small sizes; what is missing gets a row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.gpu.checks import CHECKS, measured
from bench.gpu.common import Check, MissingError, Setting, ToleranceError, need
from bench.gpu.training import TOLERANCES, forget_precision
from bench.gpu_check import in_process, table

_SHORT = ("device", "parse", "faces", "captions", "step")


@pytest.fixture(autouse=True)
def _any_precision_afterwards() -> Iterator[None]:
    """Other tests of this process may train in another precision."""
    yield
    forget_precision()


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
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
    with pytest.raises(ToleranceError, match="too far"):
        need(False, "too far", {})


def test_a_check_that_takes_too_long_is_stopped(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Check(run=CHECKS["step"].run, packages=(), seconds=1)
    monkeypatch.setitem(CHECKS, "step", slow)
    row = in_process("step", setting)
    assert (row["status"], row["detail"]) == ("failed", "stopped after 1 s")


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
