"""Replay of a step, and what data.jsonl records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from configs.errors import ConfigError
from tests.train.helpers import run, small
from train.cli import app
from train.history import read_lines
from train.replay import replay
from train.segments import read_segments
from train.shards import ShardSet


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


def test_the_command_prints_a_table_or_json_and_saves_the_pictures(
    output: Path, tmp_path: Path
) -> None:
    command = ["replay", str(output), "--step", "3", "--images", str(tmp_path / "images")]
    table = CliRunner().invoke(app, command)
    assert table.exit_code == 0 and "all bits are equal" in table.stdout
    result = CliRunner().invoke(app, [*command, "--json"])
    values = json.loads(result.stdout)
    assert values["equal"] and values["checkpoint"] == str(output / "checkpoint-000002")
    pictures = sorted((tmp_path / "images").iterdir())
    assert len(pictures) == len(values["samples"]) == 4
    for sample, path in zip(values["samples"], pictures, strict=True):
        assert sample["key"] in table.stdout and sample["shard"] in table.stdout
        assert sample["key"] in path.name and f"{sample['losses']['loss']:.6f}" in path.name
        assert Image.open(path).size == (32, 32)


@pytest.mark.parametrize(
    ("step", "message"),
    [(7, "the run has 6 steps"), (3, r"data\.jsonl is missing")],
)
def test_a_step_that_is_not_recorded_is_an_error(
    output: Path, tmp_path: Path, step: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        replay(output if step == 7 else tmp_path, step)


def test_a_resume_is_recorded_with_what_it_trains_on(output: Path, data: Path) -> None:
    first, second = read_segments(output)
    assert (first.step, first.last_step, second.step, second.last_step) == (0, 4, 4, None)
    assert (second.position, second.resumed_from) == (16, str(output / "checkpoint-000004"))
    assert second.data == (ShardSet(str(data), "train").digest,) and second.processes == 1
    assert second.positions(5) == range(16, 20) and second.step_at(19) == 5
    assert second.config().max_train_steps == 6 and first.config().max_train_steps == 4
