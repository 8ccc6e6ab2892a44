"""The command: its help, its errors, Ctrl-C, and several processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from accelerate.state import AcceleratorState
from typer.testing import CliRunner, Result

from configs.load import dump
from tests.pipelines.helpers import zero_images
from tests.train.helpers import small
from train.checkpoints import checkpoints
from train.cli import app
from train.history import read_lines

ROOT = Path(__file__).parents[2]


def call(*arguments: object) -> Result:
    """`run` in this process."""
    return CliRunner().invoke(app, ["run", *map(str, arguments)])


def start(*command: object) -> subprocess.CompletedProcess[str]:
    """Runs Python in another process."""
    arguments = [sys.executable, *(str(word) for word in command)]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def preset(data: Path, tiny_base: Path, tmp_path: Path) -> Path:
    dump(small(data, tiny_base, tmp_path / "out"), tmp_path / "preset.yaml")
    return tmp_path / "preset.yaml"


def test_help_shows_examples_and_does_not_load_torch() -> None:
    started = time.monotonic()
    process = start("-m", "train.cli", "run", "--help")
    seconds = time.monotonic() - started
    assert process.returncode == 0
    assert "accelerate launch" in process.stdout and "data=" in process.stdout
    imported = start("-c", "import sys, train.cli; print('torch' in sys.modules)")
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
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not (ROOT / "x").exists()


def test_a_damaged_image_is_a_line_without_a_traceback(
    data: Path, preset: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(data, tmp_path / "damaged"))
    for path in (damaged / "shards").glob("*.tar"):
        zero_images(path)
    result = call("--config", preset, f"data={damaged}", "num_workers=1")
    assert result.exit_code == 2 and "Traceback" not in result.stderr
    *messages, line = result.stderr.splitlines()
    assert "leaves out sample" in messages[-1] and "not those written" in messages[-1]
    assert re.match(r"error: \d of 8 samples can't be trained on.*max_bad_share=0.001", line)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.thorough)]
)
def test_a_signal_to_all_processes_writes_a_checkpoint_from_which_the_command_resumes(
    preset: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "train.cli", "run", "--config", str(preset)]
    settings = ["max_train_steps=400", "num_workers=2", "log_every=1"]
    output = tmp_path / "out"
    running = subprocess.Popen(
        [*command, *settings], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while running.poll() is None and len([*read_lines(output / "losses.jsonl")]) < 3:
        time.sleep(0.1)
    for _ in range(2):  # a launcher that gets it too passes it on
        os.killpg(running.pid, number)  # to the workers too, as from a terminal or a scheduler
        time.sleep(0.05)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 128 + number, stderr
    assert "the same command resumes" in stderr and "Traceback" not in stderr
    last = len([*read_lines(output / "losses.jsonl")])
    resumed = call("--config", preset, f"max_train_steps={last + 2}")
    assert resumed.exit_code == 0
    assert f"at step {last}" in resumed.stderr and "noise loss" in resumed.stdout
    steps = [line["step"] for line in [*read_lines(output / "losses.jsonl")]]
    assert steps == list(range(1, last + 3))


@pytest.mark.slow
def test_two_processes_do_what_one_does(
    preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # Without a GPU, both processes train on CPUs, and know of each other.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    settings = [f"output={tmp_path / 'two'}", "checkpointing_steps=5", "model.device=auto"]
    settings.append("log_keys=true")
    two = start(*launcher, "-m", "train.cli", "run", "--config", preset, *settings)
    assert two.returncode == 0, two.stderr
    assert two.stderr.count("2 samples a step = 2 processes × 1, on cpu") == 1
    one = call("--config", preset, f"output={tmp_path / 'one'}", "log_keys=true", "num_workers=1")
    assert one.exit_code == 0, one.stderr
    assert "2 samples a step = 1 process × 2, on cpu" in one.stderr
    histories = [[*read_lines(tmp_path / name / "losses.jsonl")] for name in ("one", "two")]
    assert len(histories[0]) == len(histories[1]) == 10
    # the same samples, noise and masks at every step
    for line, other in zip(*histories, strict=True):
        assert line["noise_loss"] == pytest.approx(other["noise_loss"], rel=1e-4)
        assert line["lr"] == other["lr"]
    summary = json.loads((tmp_path / "two/summary.json").read_text())
    assert (summary["steps"], summary["samples"]) == (10, 20)
    keys = [[*read_lines(tmp_path / name / "keys.jsonl")] for name in ("one", "two")]
    assert keys[0] == keys[1] and [line["step"] for line in keys[0]] == list(range(1, 11))
    consumed = [key for line in keys[0] for key in line["keys"]]
    assert len(consumed) == 20 and len({*consumed[:8]}) == len({*consumed[8:16]}) == 8
    assert consumed[:8] != consumed[8:16]  # the epochs' orders
    # one process computes a step's loss as the two did, to the last bit
    replayed = CliRunner().invoke(app, ["replay", str(tmp_path / "two"), "--step", "6", "--json"])
    values = json.loads(replayed.stdout)
    assert values["equal"], values
    # resumed by a single process
    settings = [f"output={tmp_path / 'two'}", "max_train_steps=12", "log_keys=true"]
    third = call("--config", preset, *settings)
    assert third.exit_code == 0 and "at step 10" in third.stderr
    assert [line["step"] for line in read_lines(tmp_path / "two/keys.jsonl")] == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.thorough
def test_accelerate_launch_trains_and_one_process_instead_of_two_is_an_error(
    preset: Path, tmp_path: Path
) -> None:
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes"]
    command = ["-m", "train.cli", "run", "--config", preset, "max_train_steps=2"]
    process = start(*launch, 1, *command)
    assert process.returncode == 0, process.stderr
    assert "2 samples a step = 1 process × 2, on cpu" in process.stderr
    assert (tmp_path / "out/final/adapter.safetensors").is_file()
    # it starts one process, which has no rank
    process = start(*launch, 2, *command)
    assert process.returncode != 0
    assert "error: accelerate launch was asked for several processes" in process.stderr
    assert "torchrun --nproc-per-node N" in process.stderr


@pytest.mark.slow
@pytest.mark.thorough
def test_two_processes_leave_out_the_samples_that_one_does(
    preset: Path, damaged: Path, tmp_path: Path
) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = [f"data={damaged}", "max_bad_share=0.125", "checkpointing_steps=4"]
    two = f"output={tmp_path / 'two'}"
    process = start(*launcher, "-m", "train.cli", "run", "--config", preset, *settings, two)
    assert process.returncode == 0, process.stderr
    assert call("--config", preset, *settings, f"output={tmp_path / 'one'}").exit_code == 0
    files = [tmp_path / name / "skipped.jsonl" for name in ("one", "two")]
    one, other = ([*read_lines(path)] for path in files)
    assert one == other and len(one) == 3
    # what was left out before a resume counts
    refused = call("--config", preset, *settings, two, "max_bad_share=0.1", "max_train_steps=20")
    assert refused.exit_code == 2 and "1 of 8 samples can't be trained on" in refused.stderr


@pytest.mark.slow
@pytest.mark.thorough
def test_a_signal_to_one_process_stops_all_at_the_same_step(preset: Path, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = ["max_train_steps=4000", "log_every=7", "num_workers=1"]
    command = [
        sys.executable,
        *launcher,
        "-m",
        "train.cli",
        "run",
        "--config",
        str(preset),
        *settings,
    ]
    output = tmp_path / "out"
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while running.poll() is None and not [*read_lines(output / "losses.jsonl")]:
        time.sleep(0.1)
    ranks = [p for p in psutil.Process(running.pid).children() if "train.cli" in p.cmdline()]
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGTERM)
    _, stderr = running.communicate(timeout=60)
    steps = {int(text) for text in re.findall(r"stopped after step (\d+)", stderr)}
    assert len(steps) == 1 and 0 < steps.pop() < 4000, stderr
    assert stderr.count("the same command resumes") == 2
    assert not (output / "final").exists() and len(checkpoints(output)) == 1


@pytest.fixture
def other_precision() -> Iterator[None]:
    """Accelerate keeps the precision of a process's first run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("other_precision")
def test_bf16_trains(preset: Path, tmp_path: Path) -> None:
    settings = ("mixed_precision=bf16", "max_train_steps=2")
    result = call("--config", preset, *settings)
    assert result.exit_code == 0, result.stderr
    lines = [*read_lines(tmp_path / "out/losses.jsonl")]
    assert len(lines) == 2 and all(0 < line["noise_loss"] < 3 for line in lines)
