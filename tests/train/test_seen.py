"""Which steps used a sample: after a take-down, with pairs, mixtures, resumes and bad samples."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from configs.errors import ConfigError
from configs.load import load
from configs.schema import DatasetConfig
from configs.training import DataSource
from pipelines.takedown import by_source, take_down
from stages.storage.store import Store
from tests.train.helpers import keys, run, small, with_people
from train.batches import plan_batches
from train.cli import app
from train.facts import NONFINITE, SKIPPED
from train.history import Lines, read_lines
from train.mixture import Mixture, open_mixture
from train.outcome import Progress
from train.replay import replay
from train.seen import Use, seen
from train.segments import DATA, add_segment, new_segment
from train.shards import INDEX, ShardSet


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_after_a_take_down_training_goes_on_from_the_checkpoint_that_never_saw_the_sample(
    data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    copy, output = Path(shutil.copytree(data, tmp_path / "data")), tmp_path / "run"
    config = small(
        copy,
        tiny_base,
        output,
        split="all",
        max_train_steps=5,
        checkpointing_steps=1,
        checkpoints_total_limit=0,
    )
    run(config)
    mixture = open_mixture(config)
    order = mixture.order(config.seed)
    number = order.sample(4)  # the first of step 3
    key = mixture.key(number)
    steps = [1 + place // 2 for place in range(10) if order.sample(place) == number]

    [source] = [r.source for r in ShardSet(str(copy)).records([number])]  # type: ignore[union-attr]
    settings = load(DatasetConfig, copy / "config.yaml", [f"output={copy}"])
    store = Store(str(copy))
    take_down(store, settings, by_source(store, source), "source", "")

    answer = json.loads(call("seen", output, "--takedown", copy, "--json"))
    assert [use["step"] for use in answer["uses"][key]] == steps and answer["first_use"] == 3
    assert answer["checkpoint"] == str(output / "checkpoint-000002")
    assert (answer["first_step"], answer["last_step"], answer["notes"]) == (1, 5, [])
    text = call("seen", output, "--key", key)
    assert f"{key}: {len(steps)} step" in text and answer["command"] in text

    # the command that it prints trains on without the sample
    python, _, _, *arguments = shlex.split(answer["command"])
    assert python == "python" and f"data={copy}" in arguments
    call(*arguments)
    cleaned = tmp_path / "run-cleaned"
    assert [line["step"] for line in read_lines(cleaned / DATA)] == [0, 2]
    assert [line["step"] for line in read_lines(cleaned / "losses.jsonl")] == [1, 2, 3, 4, 5]
    after = seen(cleaned, [key])
    assert after.uses[key] == [] and after.first_use is None and after.absent == []
    # both parts of the past are listed
    names = keys(mixture)
    uses = seen(cleaned, names).uses
    before = {names[order.sample(place)] for place in range(4)}
    assert {name for name in names if any(use.step <= 2 for use in uses[name])} == before
    assert sum(map(len, uses.values())) == 10
    # a step of the new part begins with the weights of the old run's checkpoint
    result = replay(cleaned, 3)
    assert result.equal and result.checkpoint == str(output / "checkpoint-000002")
    with pytest.raises(ConfigError, match="has changed since step 3 was trained"):
        replay(output, 3)


def begin(output: Path, config: Any, mixture: Mixture, step: int, position: int) -> None:
    """Records what a run on two processes records when it starts or resumes."""
    plan = plan_batches(config.global_batch_size, 2, 2)
    progress, device = Progress(step, position), torch.device("cpu")
    add_segment(output, new_segment(config, progress, plan, mixture, device, None))


def test_every_use_is_listed_with_pairs_several_data_sets_and_changes_of_data(
    data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    one = with_people(data, tmp_path / "one", "abababcc")
    other = with_people(data, tmp_path / "other", "aabbcdef")
    sources = (DataSource(path=str(one), weight=3), DataSource(path=str(other), weight=1))
    output = tmp_path / "run"
    output.mkdir()
    first = small(one, tiny_base, output, split="all", pair_prob=0.4, global_batch_size=4)
    second = replace(first, data=sources)
    expected: dict[str, list[Use]] = {key: [] for key in keys(ShardSet(str(one)))}
    skipped = Lines(output / SKIPPED, step=0)
    nonfinite = Lines(output / NONFINITE, step=0)
    for config, steps in ((first, range(1, 41)), (second, range(41, 101))):
        mixture = open_mixture(config, output / INDEX)
        order = mixture.order(config.seed)
        pairs = mixture.pairs(order)
        begin(output, config, mixture, steps.start - 1, 4 * (steps.start - 1))
        # a start that came to nothing
        begin(output, config, mixture, steps.start - 1, 4 * (steps.start - 1))
        for step in steps:
            positions = range(4 * (step - 1), 4 * step)
            used = [(order.sample(p), pairs.reference(p)) for p in positions]
            bad = used[1][1] if step % 10 == 0 else None
            if bad is not None:
                names = {"key": mixture.key(bad), "shard": mixture.shard_of(bad)}
                skipped.add([{"step": step, **names, "reason": "damaged"}])
            if step % 15 == 0:
                nonfinite.add([{"step": step, "keys": []}])
            for number, reference in used:
                remark = "the update was skipped" if step % 15 == 0 else ""
                if bad in (number, reference):
                    remark = "left out: could not be read"
                use = Use(step=step, reference=False, remark=remark)
                expected[mixture.key(number)].append(use)
                if number != reference:
                    expected[mixture.key(reference)].append(replace(use, reference=True))
    Lines(output / "losses.jsonl", step=0).add([{"step": step} for step in range(1, 101)])
    shutil.rmtree(one)  # the data are not needed
    answer = seen(output, [*expected, "f" * 20])

    def ordered(uses: list[Use]) -> list[tuple[int, bool, str]]:
        return sorted((use.step, use.reference, use.remark) for use in uses)

    for key, uses in expected.items():
        assert ordered(answer.uses[key]) == ordered(uses), key
    assert answer.absent == ["f" * 20] and answer.last_step == 100
    assert any(use.reference for use in answer.uses[key]) and answer.first_use == 1


def test_what_is_not_recorded_is_an_error_or_a_note(
    data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    with pytest.raises(ConfigError, match=r"data\.jsonl is missing or empty"):
        seen(output, ["0" * 20])
    with pytest.raises(ConfigError, match="no keys"):
        seen(output, [])
    with pytest.raises(ConfigError, match="no removal log"):
        seen(output, [], str(data))
    config = small(data, tiny_base, output, split="all", global_batch_size=4, adapter="old.bin")
    begin(output, config, open_mixture(config, output / INDEX), 7, 28)
    answer = seen(output, ["0" * 20])
    assert "Steps 1 to 7 are not recorded" in answer.notes[0]
    assert "adapter=old.bin" in answer.notes[1]
    shutil.rmtree(output / INDEX)
    with pytest.raises(ConfigError, match=r"\.arrow is missing or damaged"):
        seen(output, ["0" * 20])
