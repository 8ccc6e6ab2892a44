"""Replay of a step, and what data.jsonl records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.train.helpers import run, small
from train.history import read_lines
from train.replay import replay


def lines(output: Path) -> dict[int, dict[str, float]]:
    return {line["step"]: line for line in read_lines(output / "losses.jsonl")}


def content(output: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in output.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def output(data: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps in two micro-batches each, with checkpoints after steps 2, 4 and 6. It was
    resumed once.
    """
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = small(
        data,
        tiny_base,
        folder,
        train_base=True,
        global_batch_size=4,
        checkpointing_steps=2,
        max_train_steps=6,
        checkpoints_total_limit=0,
    )
    run(replace(config, max_train_steps=4))
    run(config)
    return folder


@pytest.mark.parametrize("step", [1, 3, 5])
def test_the_loss_has_the_bits_that_were_recorded(output: Path, step: int) -> None:
    before = content(output)
    result = replay(output, step)
    assert content(output) == before
    assert result.after_step == step - 1 and result.notes == []
    assert bool(result.checkpoint) == (step > 1)
    line = lines(output)[step]
    assert result.loss == result.recorded == line["loss"] and result.equal
    assert len(result.samples) == 4
    losses = [sample.losses["loss"] or 0 for sample in result.samples]
    assert losses == sorted(losses, reverse=True)
    assert np.mean(losses) == pytest.approx(line["loss"])
    assert float(np.float32(line["loss"])) != line["loss"]  # written shortest
    assert str(np.float32(line["loss"])) == str(line["loss"])


def test_from_an_older_checkpoint_the_loss_is_another_which_it_says(output: Path) -> None:
    result = replay(output, 4)
    assert result.after_step == 2 and not result.equal
    assert result.loss == pytest.approx(result.recorded, rel=0.5) and result.loss != result.recorded
    assert "1 step older" in result.notes[0]
