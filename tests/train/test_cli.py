"""The command: its help, its errors, Ctrl-C, and several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.load import dump
from tests.train.helpers import small
from train.history import read_history

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "train.cli"]


def call(*arguments: str, command: list[str] = COMMAND) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture
def preset(data: Path, tiny_base: Path, tmp_path: Path) -> Path:
    dump(small(data, tiny_base, tmp_path / "out"), tmp_path / "preset.yaml")
    return tmp_path / "preset.yaml"


def test_help_shows_examples_and_does_not_load_torch() -> None:
    started = time.monotonic()
    process = call("--help")
    seconds = time.monotonic() - started
    assert process.returncode == 0
    assert "accelerate launch" in process.stdout and "data=" in process.stdout
    imported = call(
        "-c", "import sys, train.cli; print('torch' in sys.modules)", command=[sys.executable]
    )
    assert imported.stdout.strip() == "False"
    assert seconds < 5  # about half a second on an idle machine


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["output=x"], "data=OUT"),
        (["data=/nowhere", "output=x"], "Run make dataset first"),
        (["learning_rat=1"], "unknown key learning_rat"),
        (["optim.learning_rate=-1"], "expected more than 0"),
        (["--config", "/no/such.yaml"], "no configuration at"),
    ],
)
def test_a_users_error_is_a_line_without_a_traceback(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    process = call(*arguments)
    assert process.returncode == 2
    assert message in process.stderr and "Traceback" not in process.stderr
    assert not (ROOT / "x").exists()


@pytest.mark.slow
def test_ctrl_c_writes_a_checkpoint_from_which_the_same_command_resumes(
    preset: Path, tmp_path: Path
) -> None:
    command = [
        *COMMAND,
        "--config",
        str(preset),
        "max_train_steps=400",
        "num_workers=2",
        "log_every=1",
    ]
    output = tmp_path / "out"
    running = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while running.poll() is None and len(read_history(output / "losses.jsonl")) < 3:
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGINT)  # to the workers too, as from a terminal
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 130, stderr
    assert "the same command resumes" in stderr and "Traceback" not in stderr
    last = len(read_history(output / "losses.jsonl"))
    resumed = call("--config", str(preset), f"max_train_steps={last + 2}")
    assert resumed.returncode == 0
    assert f"at step {last}" in resumed.stderr and "noise loss" in resumed.stdout
    steps = [line["step"] for line in read_history(output / "losses.jsonl")]
    assert steps == list(range(1, last + 3))


@pytest.mark.slow
def test_two_processes_do_what_one_does(preset: Path, data: Path, tmp_path: Path) -> None:
    # On a CPU, accelerate launch doesn't start several processes. Torch's launcher does, with the
    # same environment variables.
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "train.cli",
    ]
    settings = [f"output={tmp_path / 'two'}", "train_batch_size=1", "checkpointing_steps=5"]
    two = call("--config", str(preset), *settings, command=launch)
    assert two.returncode == 0, two.stderr
    one = call("--config", str(preset), f"output={tmp_path / 'one'}")
    assert one.returncode == 0, one.stderr
    histories = [read_history(tmp_path / name / "losses.jsonl") for name in ("one", "two")]
    assert len(histories[0]) == len(histories[1]) == 10
    # the same samples, noise and masks at every step
    for line, other in zip(*histories, strict=True):
        assert line["noise_loss"] == pytest.approx(other["noise_loss"], rel=1e-4)
        assert line["lr"] == other["lr"]
    summary = json.loads((tmp_path / "two/summary.json").read_text())
    assert (summary["steps"], summary["samples"]) == (10, 20)
    # resumed by a single process
    third = call("--config", str(preset), f"output={tmp_path / 'two'}", "max_train_steps=12")
    assert third.returncode == 0 and "at step 10" in third.stderr


def test_bf16_trains(preset: Path, tmp_path: Path) -> None:
    process = call(
        "--config", str(preset), "mixed_precision=bf16", "max_train_steps=2", "train_base=true"
    )
    assert process.returncode == 0, process.stderr
    lines = read_history(tmp_path / "out/losses.jsonl")
    assert len(lines) == 2 and all(0 < line["noise_loss"] < 3 for line in lines)
