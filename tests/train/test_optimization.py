"""What trains and how fast: parts, learning rates, the moving average, and resuming them."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.errors import ConfigError, WeightsError
from configs.load import load
from configs.training import (
    PARTS,
    EmaConfig,
    ModelConfig,
    OptimConfig,
    PartRates,
    TrainConfig,
    TrainedConfig,
)
from model.checkpoint import read_adapter
from model.consistentid import part_of
from model.forms import write_ip_adapter
from tests.train.helpers import Listener, run, same, small, weights
from train.checkpoints import FILES, write_file_list
from train.history import read_lines


@pytest.fixture(scope="module")
def initial(data: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step without an update: its checkpoint has the initial weights."""
    output = tmp_path_factory.mktemp("runs") / "initial"
    run(changed(data, tiny_base, output, learning_rate=1e-30, steps=1))
    return output / "checkpoint-000001"


@pytest.fixture(scope="module")
def plain(data: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of three steps that trains everything."""
    output = tmp_path_factory.mktemp("runs") / "plain"
    run(changed(data, tiny_base, output))
    return output


def changed(
    data: Path,
    base: Path,
    output: Path,
    *,
    parts: tuple[Any, ...] = ("full",),
    learning_rate: float = 1e-3,
    steps: int = 3,
    **changes: Any,
) -> TrainConfig:
    optim = OptimConfig(learning_rate=learning_rate, lr_scheduler="constant", adam_weight_decay=0)
    values = {"optim": optim, "max_train_steps": steps, "train": TrainedConfig(parts=parts)}
    return small(data, base, output, **{**values, **changes})


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """Returns by how much the weights of each part differ, their root mean square."""
    sums, counts = Counter[str](), Counter[str]()
    for key, value in after.items():
        sums[part_of(key)] += float((value - before[key]).square().sum())  # type: ignore[assignment]
        counts[part_of(key)] += value.numel()
    return {part: (sums[part] / counts[part]) ** 0.5 for part in PARTS}


@pytest.mark.parametrize(
    ("parts", "training"),
    [
        (("full",), PARTS),
        (("paper",), ("projector", "facial_encoder")),
        (("projector_only",), ("projector",)),
        (("identity_kv",), ("identity_kv",)),
        (("lora", "projector_only"), ("projector", "lora")),
    ],
)
def test_only_the_named_parts_change(
    initial: Path,
    data: Path,
    tiny_base: Path,
    tmp_path: Path,
    parts: tuple[str, ...],
    training: tuple[str, ...],
) -> None:
    listener = Listener()
    outcome = run(changed(data, tiny_base, tmp_path / "run", parts=parts), listener)
    assert outcome.adapter is not None
    after = weights(outcome.adapter)
    by_part = moved(weights(initial), after)
    assert {part for part, distance in by_part.items() if distance > 0} == {*training}
    banner = next(text for text in listener.messages if "parameters train" in text)
    for part in PARTS:
        count = sum(value.numel() for key, value in after.items() if part_of(key) == part)
        assert (f"{part:<14}  {count:>13,}  at 0.001" in banner) == (part in training)


def test_a_part_has_its_own_learning_rate(
    initial: Path, plain: Path, data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = changed(data, tiny_base, tmp_path / "run")
    slow = replace(config.optim, learning_rates=PartRates(facial_encoder=1e-5))
    outcome = run(replace(config, optim=slow))
    assert outcome.adapter is not None
    before = weights(initial)
    by_part, all_equal = (
        moved(before, weights(folder)) for folder in (outcome.adapter, plain / "final")
    )
    # a step of Adam is at most about the learning rate
    assert by_part["facial_encoder"] < all_equal["facial_encoder"] / 50
    assert by_part["projector"] == pytest.approx(all_equal["projector"], rel=0.1)
    line = next(read_lines(tmp_path / "run/losses.jsonl"))
    assert line["lr"] == 1e-3 and line["lr_facial_encoder"] == 1e-5
    assert "lr_facial_encoder" not in next(read_lines(plain / "losses.jsonl"))


def test_a_run_begins_with_the_weights_of_an_ip_adapter(
    initial: Path, plain: Path, data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    write_ip_adapter(read_adapter(plain / "final"), tmp_path / "start.bin")
    config = changed(data, tiny_base, tmp_path / "run", learning_rate=1e-30, steps=1)
    listener = Listener()
    run(replace(config, adapter=str(tmp_path / "start.bin")), listener)
    before, start = weights(initial), weights(plain / "final")
    for key, value in weights(tmp_path / "run/checkpoint-000001").items():
        expected = before if part_of(key) == "facial_encoder" else start
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-20)
    assert any("facial_encoder  0 of" in text for text in listener.messages)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.parts=[]"], r"train\.parts is empty"),
        (["train.parts=everything"], "one of full, paper, projector_only, projector"),
        (["train.parts=lora", "model.without=lora"], r"names lora, .* \(model\.without\)"),
        (["train.parts=identity_kv", "model.without=projector"], "names identity_kv"),
        (
            ["train.parts=paper", "model.without=[projector,facial_encoder]"],
            r"has nothing that the model has",
        ),
        (
            ["train.parts=projector_only", "optim.learning_rates.lora=1e-5"],
            r"learning_rates\.lora is given, but lora doesn't train",
        ),
        (["optim.learning_rates.lora=0"], r"learning_rates\.lora=0\.0: expected more than 0"),
        (["ema.decay=1"], r"ema\.decay=1\.0: expected 0 up to 1"),
    ],
)
def test_wrong_settings_are_named(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load(TrainConfig, None, overrides)


def test_a_preset_leaves_out_what_the_model_lacks() -> None:
    config = TrainConfig(model=ModelConfig(without=("projector",)))
    assert config.trained_parts == ("facial_encoder", "lora")


def test_parts_may_be_exchanged_on_request_and_the_others_keep_their_moments(
    data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    first = changed(data, tiny_base, tmp_path / "run", parts=("paper",), steps=2)
    run(first)
    other = changed(data, tiny_base, tmp_path / "run", parts=("projector", "lora"), steps=4)
    with pytest.raises(ConfigError, match=r"train\.parts=.*accept_changes=\[train\.parts\]"):
        run(other)
    run(replace(other, accept_changes=("train.parts",)))
    steps = optimizer_steps(tmp_path / "run/checkpoint-000004")
    assert {part: {*each} for part, each in steps.items()} == {"projector": {4}, "lora": {2}}


def optimizer_steps(checkpoint: Path) -> dict[str, list[float]]:
    """Returns by part how many updates each parameter's moments have."""
    optimizer = torch.load(checkpoint / "state.pt", weights_only=True)["optimizer"]
    return {
        group["part"]: [float(optimizer["state"][number]["step"]) for number in group["params"]]
        for group in optimizer["param_groups"]
    }


def test_a_checkpoint_without_names_of_parameters_is_refused(
    data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = changed(data, tiny_base, tmp_path / "run", steps=1)
    run(config)
    checkpoint = tmp_path / "run/checkpoint-000001"
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        del group["param_names"]
    torch.save(state, checkpoint / "state.pt")
    (checkpoint / FILES).unlink()
    write_file_list(checkpoint)
    with pytest.raises(WeightsError, match=r"earlier version.*adapter=CHECKPOINT"):
        run(replace(config, max_train_steps=2))


def test_the_final_adapter_is_the_moving_average(
    data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = changed(data, tiny_base, tmp_path / "run", steps=4)
    config = replace(
        config, checkpointing_steps=1, checkpoints_total_limit=0, ema=EmaConfig(decay=0.3)
    )
    outcome = run(config)
    steps = [weights(tmp_path / f"run/checkpoint-{step:06d}") for step in range(1, 5)]
    average = steps[0]
    for step, present in enumerate(steps[1:], start=1):
        decay = min(0.3, (1 + step) / (10 + step))
        average = {key: decay * average[key] + (1 - decay) * present[key] for key in present}
    assert outcome.adapter is not None
    final = weights(outcome.adapter)
    for key, value in final.items():
        torch.testing.assert_close(value, average[key], rtol=1e-5, atol=1e-7)
    assert not same(final, steps[-1])

    # resumed in the middle, on the CPU or not: the same average
    shutil.copytree(tmp_path / "run/checkpoint-000002", tmp_path / "again/checkpoint-000002")
    again = replace(config, output=str(tmp_path / "again"), ema=EmaConfig(decay=0.3, on_cpu=True))
    resumed = run(again)
    assert resumed.adapter is not None and same(final, weights(resumed.adapter))
