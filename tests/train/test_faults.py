"""Bad samples, values that are not finite, and signals: what is lost, what is recorded."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from configs.errors import TrainingError
from configs.training import OptimConfig
from stages.record import Record
from tests.train.conftest import Mixed
from tests.train.helpers import Listener, Parts, run, small, sources
from train.batch_maker import BatchMaker, Fetched
from train.facts import Limits, StepCheck, StepFacts
from train.history import read_lines
from train.mixture import Mixture, open_mixture
from train.order import SampleOrder
from train.packing import BadSample
from train.shards import ShardSet
from train.state import AdapterExtras, Snapshot
from train.trainer import Trainer
from train.writer import CheckpointWriter


def test_a_bad_sample_is_left_out_and_the_order_of_the_others_stays(
    damaged: Path, data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = small(damaged, tiny_base, tmp_path / "out", max_bad_share=0.2, max_train_steps=8)
    listener = Listener()
    outcome = run(config, listener)
    assert outcome.step == 8 and outcome.adapter is not None
    key = ShardSet(str(data)).key(2)
    lines = [*read_lines(tmp_path / "out/skipped.jsonl")]
    order = SampleOrder([8], config.seed)
    steps = [1 + position // 2 for position in range(16) if order.sample(position) == 2]
    assert [line["step"] for line in lines] == steps and len(steps) == 2
    assert {(line["key"], line["shard"]) for line in lines} == {(key, "fgid-000000.tar")}
    assert "not those written" in lines[0]["reason"]
    announced = [text for text in listener.messages if key in text]
    assert len(announced) == 1 and announced[0].startswith(
        f"step {steps[0]} leaves out sample {key}"
    )


def test_too_many_bad_samples_end_the_run_with_their_share(
    damaged: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = small(damaged, tiny_base, tmp_path / "out", max_bad_share=0.1, max_train_steps=8)
    with pytest.raises(TrainingError, match=r"1 of 8 samples .* max_bad_share=0\.1 allows"):
        run(config)
    assert run(replace(config, max_bad_share=0.125)).step == 8


def test_the_loss_is_the_mean_over_valid_samples(parts: Parts) -> None:
    from train.step import step_losses

    config = parts.config.loss
    batch = parts.make(range(4))
    blank = replace(batch, valid=torch.tensor([True, True, False, True]))
    whole = step_losses(parts.trained, parts.frozen, batch, config, mask=False)
    part = step_losses(parts.trained, parts.frozen, blank, config, mask=False)
    errors_of_valid = whole.errors[[0, 1, 3], 0]
    torch.testing.assert_close(part.total.detach(), errors_of_valid.mean())
    none = replace(batch, valid=torch.zeros(4, dtype=torch.bool))
    nothing = step_losses(parts.trained, parts.frozen, none, config, mask=False)
    nothing.total.backward()
    assert nothing.total.item() == 0


@pytest.mark.parametrize("identity", [np.nan, np.inf, 0.0, 2.0])
def test_an_identity_without_unit_norm_makes_a_sample_bad(
    parts: Parts, data: Path, tmp_path: Path, identity: float
) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    shards = ShardSet(str(copy))
    [record] = shards.records([5])
    assert isinstance(record, Record) and record.identity is not None
    tar, vector = copy / "shards" / shards.shard_of(5), np.zeros(512, np.float32)
    vector[3] = identity
    content, before = tar.read_bytes(), record.identity.tobytes()
    assert content.count(before) == 1
    tar.write_bytes(content.replace(before, vector.tobytes()))
    # without verification, which would find the changed bytes first
    mixture = Mixture(sources(copy))
    maker = BatchMaker(mixture, mixture.order(0), replace(parts.preparation, verify=False))
    fetched = Fetched({5: mixture.records([5], verify=False)[0]}, {}, {}, {})
    blank = maker._prepare((5, 5), fetched)
    assert blank.bad is not None and blank.bad.key == shards.key(5)
    assert "the identity embedding has norm" in blank.bad.reason
    assert not blank.conditions.identity.any() and not blank.pixels.any()


def poisoned_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter.safetensors")


def test_an_error_ends_the_workers(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    def fail(step: int) -> None:
        raise RuntimeError("not a PipelineError")

    # they ignore SIGTERM, which Python sends to them at its exit before it waits for their end
    with pytest.raises(RuntimeError) as error:
        run(small(data, tiny_base, tmp_path / "out", num_workers=2), Listener(fail))
    assert not multiprocessing.active_children()
    del error  # it refers to the loader


def test_updates_that_are_not_finite_are_skipped_and_end_the_run_after_some(
    mixed: Mixed, tiny_base: Path, tmp_path: Path
) -> None:
    # a learning rate at which the weights explode
    optim = OptimConfig(learning_rate=1e30, max_grad_norm=1e30)
    config = small(
        mixed.sources[:1],
        tiny_base,
        tmp_path / "out",
        pair_prob=1.0,
        optim=optim,
        max_nonfinite_steps=3,
        checkpointing_steps=2,
        max_train_steps=40,
    )
    listener = Listener()
    with pytest.raises(TrainingError, match="updates of 3 steps in a row were skipped"):
        run(config, listener)
    lines = [*read_lines(tmp_path / "out/nonfinite.jsonl")]
    steps = [line["step"] for line in lines][-3:]
    assert steps == list(range(steps[0], steps[0] + 3))
    mixture = open_mixture(config)
    order = mixture.order(config.seed)
    last = lines[-1]
    positions = range(2 * (last["step"] - 1), 2 * last["step"])
    assert last["keys"] == [mixture.key(order.sample(position)) for position in positions]
    references = map(mixture.pairs(order).reference, positions)
    assert last["references"] == [mixture.key(reference) for reference in references]
    assert last["references"] != last["keys"]
    assert all(key in listener.messages[-1] for key in (*last["keys"], *last["references"]))
    for folder in (tmp_path / "out").glob("checkpoint-*"):
        assert all(torch.isfinite(value).all() for value in poisoned_weights(folder).values())
    history = [
        json.loads(line) for line in (tmp_path / "out/losses.jsonl").read_text().split("\n") if line
    ]
    assert all(line["step"] <= last["step"] for line in history)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_skipped_update_changes_nothing_and_the_next_one_counts(
    data: Path, tiny_base: Path, tmp_path: Path, optimizer: Any
) -> None:
    optim = OptimConfig(learning_rate=1e-3, lr_scheduler="constant", optimizer=optimizer)
    config = small(data, tiny_base, tmp_path / "out", optim=optim, max_train_steps=4)
    snapshots: list[list[torch.Tensor]] = []
    spoiled = [False]

    def snapshot(step: int) -> None:
        snapshots.append([p.detach().clone() for p in trainer.optimization.parameters])
        spoiled[0] = step == 1  # the gradient of the second step

    listener = Listener(snapshot)
    with ExitStack() as stack:
        trainer = Trainer(config, listener, stack)
        trainer.optimization.parameters[3].register_hook(
            lambda g: g * torch.nan if spoiled[0] else g
        )
        outcome = trainer.run()
    assert outcome.step == 4
    first, second, third, _ = snapshots
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(second, third, strict=True))
    assert {float(s["step"]) for s in trainer.optimization.optimizer.state.values()} == {3.0}
    assert [line["step"] for line in read_lines(tmp_path / "out/nonfinite.jsonl")] == [2]
    assert "step 2: loss or gradient is not finite" in listener.messages[-1]


def test_a_checkpoint_with_values_that_are_not_finite_is_not_written(
    parts: Parts, tmp_path: Path
) -> None:
    extras = AdapterExtras(metadata={}, dataset="")
    with torch.no_grad():
        next(parts.trained.adapter.parameters())[0] = torch.nan
    snapshot = Snapshot(parts.trained, extras, {"step": 5}, {})
    with pytest.raises(TrainingError, match="not finite after step 5, so no checkpoint"):
        CheckpointWriter(tmp_path, 1, print).write(snapshot)
    assert list(tmp_path.iterdir()) == []


def test_bad_samples_of_one_key_in_two_data_sets_are_two(tmp_path: Path) -> None:
    limits = Limits(batch=2, samples=20, bad_share=0.05, nonfinite_steps=1)
    check = StepCheck(tmp_path, 0, limits, lambda _: ("", ""), list, lambda _: None)
    one, other = (BadSample("key", f"{folder}/shards/fgid-000000.tar", "") for folder in "ab")
    numbers = torch.tensor([1.0, 0.0, 0.0])
    for step in (1, 2):
        check.check(StepFacts(step, 0, numbers, (one,)))
    with pytest.raises(TrainingError, match="2 of 20 samples"):
        check.check(StepFacts(3, 0, numbers, (other,)))
    # also after a resume
    again = StepCheck(tmp_path, 2, limits, lambda _: ("", ""), list, lambda _: None)
    with pytest.raises(TrainingError, match="2 of 20 samples"):
        again.check(StepFacts(3, 0, numbers, (other,)))
