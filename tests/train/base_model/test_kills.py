"""The command that trains a base model, killed and stopped at different times, as processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.load import dump
from tests.train.base_model.test_run import LOSSES, settings, trained, weights  # noqa: F401

_PATIENCE = 120  # seconds until a part must have started


@pytest.mark.thorough
def test_a_killed_run_continues_to_the_same_bytes(
    trained: Path,  # noqa: F811
    data: Path,
    tmp_path: Path,
) -> None:
    config = settings(data, tmp_path / "out")
    dump(config, tmp_path / "config.yaml")
    command = [sys.executable, "-m", "train.base_model", "run", "-c", str(tmp_path / "config.yaml")]
    # each start is ended as soon as this file is there
    ends = [
        ("samples/info.json", signal.SIGKILL),
        ("autoencoder/checkpoint-000002/files.json", signal.SIGTERM),
        ("towers/checkpoint-000002/files.json", signal.SIGKILL),
        ("denoiser/checkpoint-000002/files.json", signal.SIGKILL),
    ]
    statuses = [_ended(command, config.output, *each) for each in ends]
    assert statuses[0] == -signal.SIGKILL
    assert all(status in (0, 128 + signal.SIGTERM, -signal.SIGKILL) for status in statuses)
    subprocess.run(command, check=True, capture_output=True, env=_environment())
    assert weights(tmp_path / "out") == weights(trained)
    for name in LOSSES:
        ours, theirs = (each / name / "losses.jsonl" for each in (tmp_path / "out", trained))
        assert ours.read_text() == theirs.read_text()
    assert not [*(tmp_path / "out").rglob(".*.partial")]


def _ended(command: list[str], output: str, awaited: str, number: signal.Signals) -> int:
    """Starts the command, and sends it a signal once a file is in its output."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_environment()
    )
    started = time.monotonic()
    while process.poll() is None and not Path(output, awaited).is_file():
        assert time.monotonic() - started < _PATIENCE, f"no {awaited}"
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait()


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}
