"""What a resumed run is compared with, and differences that are accepted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from configs.errors import ConfigError
from configs.load import load
from configs.training import LossConfig, ModelConfig, OptimConfig, TrainConfig, TrainedConfig
from tests.train.helpers import Listener, run, small
from train.history import read_lines
from train.optimization import load_optimizer, make_optimizer
from train.resume import Samples, check_same_run, differences
from train.shards import ShardSet


@pytest.fixture(scope="module")
def first(data: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of four steps with a constant learning rate."""
    output = tmp_path_factory.mktemp("runs") / "first"
    run(constant(data, tiny_base, output, 1e-3, max_train_steps=4))
    return output


@pytest.fixture(scope="module")
def cleaned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set without its last shard."""
    copy = Path(shutil.copytree(data, tmp_path_factory.mktemp("cleaned") / "data"))
    for file in (copy / "shards").glob("fgid-000002.*"):
        file.unlink()
    return copy


def constant(data: Path, base: Path, output: Path, rate: float, **changes: object) -> TrainConfig:
    optim = OptimConfig(learning_rate=rate, lr_scheduler="constant")
    return small(data, base, output, **{"optim": optim, **changes})


def test_other_samples_are_refused_and_accepted_on_request(
    first: Path, data: Path, cleaned: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = constant(
        cleaned,
        tiny_base,
        tmp_path / "new",
        1e-3,
        max_train_steps=6,
        resume_from_checkpoint=str(first / "checkpoint-000004"),
    )
    old, new = (ShardSet(str(folder), "train").digest[:12] for folder in (data, cleaned))
    text = f"data had 8 samples with digest {old}, now 6 samples with digest {new}"
    with pytest.raises(ConfigError, match=rf"{text}\. .*accept_changes=\[data\]"):
        run(config)
    listener, accepting = Listener(), replace(config, accept_changes=("data",))
    assert run(accepting, listener).step == 6
    assert f"accepted, since checkpoint-000004: {text}" in listener.messages
    # what follows is compared with the new samples
    listener = Listener()
    assert run(replace(config, max_train_steps=7), listener).step == 7
    assert not [text for text in listener.messages if "accepted" in text]
    assert "at step 6" in " ".join(listener.messages)


def test_an_accepted_learning_rate_takes_effect(
    first: Path, data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(first, tmp_path / "out"))
    config = constant(data, tiny_base, output, 2e-4, max_train_steps=6)
    with pytest.raises(ConfigError, match=r"optim\.learning_rate=0\.001, now 0\.0002"):
        run(config)
    with pytest.raises(ConfigError, match=r"optim\.learning_rate=0\.001, now 0\.0002"):
        run(replace(config, accept_changes=("data", "optim.adam_beta1")))
    run(replace(config, accept_changes=("optim.learning_rate",)))
    rates = [line["lr"] for line in read_lines(output / "losses.jsonl")]
    assert rates == [1e-3] * 4 + [2e-4] * 2
    assert load(TrainConfig, output / "config.yaml").accept_changes == ()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"global_batch_size": 4}, "global_batch_size"),
        ({"seed": 4}, "seed"),
        ({"split": "all"}, "split"),
        ({"loss": LossConfig(drop_text=0.2)}, "loss.drop_text"),
        ({"model": ModelConfig(spec="tiny", base="/other", device="cpu")}, "model.base"),
        ({"micro_batch_size": 1, "mixed_precision": "bf16", "num_workers": 3}, ""),
    ],
)
def test_a_setting_that_changes_the_result_is_compared(
    first: Path, data: Path, tiny_base: Path, changes: dict[str, object], name: str
) -> None:
    samples = Samples(ShardSet(str(data), "train").digest, 8)
    config = constant(data, tiny_base, first, 1e-3, **changes)
    assert name in differences(config, samples, first / "checkpoint-000004") or not name
    if not name:
        assert differences(config, samples, first / "checkpoint-000004") == {}


def test_a_setting_that_the_checkpoint_does_not_know_had_its_default(
    first: Path, data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(first / "checkpoint-000004", tmp_path / "copy"))
    content = json.loads((copy / "adapter.json").read_text())
    del content["train"]["log_every"], content["train"]["seed"]
    (copy / "adapter.json").write_text(json.dumps(content))
    config = constant(data, tiny_base, first, 1e-3)
    samples = Samples(content["data"], content["samples"])
    assert differences(config, samples, copy) == {"seed": "seed=0, now 3"}


def test_learning_rates_are_those_of_the_new_number_of_steps() -> None:
    optim = OptimConfig(learning_rate=1e-3, lr_scheduler="cosine")
    train = TrainedConfig(parts=("lora",))

    def optimizer_at(steps: int, total: int) -> tuple[Any, Any]:
        config = TrainConfig(optim=optim, train=train, max_train_steps=total)
        parameters = {"adapter_modules.0.to_q_lora.down.weight": nn.Parameter(torch.ones(1))}
        optimizer, schedule = make_optimizer(config, parameters)
        for _ in range(steps):
            optimizer.step()
            schedule.step()
        return optimizer, schedule

    optimizer, schedule = optimizer_at(3, 3)
    state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    resumed, resumed_schedule = optimizer_at(0, 6)
    load_optimizer(resumed, resumed_schedule, state)
    straight, straight_schedule = optimizer_at(3, 6)
    for _ in range(3):
        assert resumed.param_groups[0]["lr"] == straight.param_groups[0]["lr"] > 0
        assert resumed_schedule.get_last_lr() == straight_schedule.get_last_lr()
        for each in (resumed, straight, resumed_schedule, straight_schedule):
            each.step()


def test_a_schedule_that_depends_on_the_number_of_steps_is_announced(
    first: Path, data: Path, tiny_base: Path
) -> None:
    accepted = ("optim.lr_scheduler",)
    config = constant(data, tiny_base, first, 1e-3, max_train_steps=6, accept_changes=accepted)
    content = json.loads((first / "checkpoint-000004/adapter.json").read_text())
    samples = Samples(content["data"], content["samples"])
    messages: list[str] = []
    check_same_run(config, samples, first / "checkpoint-000004", messages.append)
    assert messages == []
    config = replace(config, optim=replace(config.optim, lr_scheduler="linear"))
    check_same_run(config, samples, first / "checkpoint-000004", messages.append)
    assert "lr_scheduler='constant', now 'linear'" in messages[0]
    assert "lr_scheduler=linear depends on max_train_steps=4, now 6" in messages[1]
