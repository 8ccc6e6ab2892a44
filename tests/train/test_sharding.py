"""Training with FSDP, on two processes on the CPU, and what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from configs.errors import ConfigError
from configs.load import dump, load
from configs.training import EmaConfig, TrainConfig
from tests.train.helpers import run, same, small, weights
from train.history import read_lines
from train.setup import check_config
from train.sharding import check_sharding, is_asked_for

ROOT = Path(__file__).parents[2]


def launcher_environment(*options: str) -> dict[str, str]:
    """Returns the variables by which `accelerate launch` asks for FSDP on GPUs.

    On a machine without, it doesn't start several processes, so the tests start them by torchrun.
    """
    always = ("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no")
    arguments = ["--use_fsdp", *options, *always, "--dynamo_backend", "no", "-m", "train.cli"]
    environment = prepare_multi_gpu_env(launch_command_parser().parse_args(arguments))
    return {name: value for name, value in environment.items() if "FSDP" in name}


def launch(*command: object) -> str:
    """Runs a module in two processes that are asked for FSDP; returns what they print."""
    environment = {**os.environ, **launcher_environment("--fsdp_version", "2")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    arguments = [sys.executable, *launcher, *(str(word) for word in command)]
    process = subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stderr


@pytest.fixture(scope="module")
def config(data: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Settings of four steps: two processes take two micro-batches in each."""
    return small(
        data,
        tiny_base,
        tmp_path_factory.mktemp("runs") / "one",
        global_batch_size=4,
        micro_batch_size=1,
        max_train_steps=4,
        checkpointing_steps=2,
        gradient_checkpointing=True,
        ema=EmaConfig(decay=0.3),
    )


@pytest.fixture(scope="module")
def one(config: TrainConfig) -> Path:
    """The output of a run in one process."""
    run(config)
    return Path(config.output)


def launch_run(config: TrainConfig, output: Path) -> str:
    dump(replace(config, output=str(output)), output.with_suffix(".yaml"))
    return launch("train.cli", "run", "--config", output.with_suffix(".yaml"))


@pytest.fixture(scope="module")
def sharded(config: TrainConfig, one: Path) -> Path:
    """The output of the same run with FSDP."""
    messages = launch_run(config, one.with_name("sharded"))
    assert (
        messages.count("4 samples a step = 2 processes × 2 micro-batches × 1, on cpu, sharded") == 1
    )
    return one.with_name("sharded")


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in read_lines(output / "losses.jsonl")]


def state(checkpoint: Path) -> dict[str, Any]:
    values: dict[str, Any] = torch.load(checkpoint / "state.pt", weights_only=True)
    return values


@pytest.mark.thorough
def test_losses_and_files_are_those_of_a_run_without(one: Path, sharded: Path) -> None:
    assert losses(sharded) == pytest.approx(losses(one), rel=1e-6)
    for folder in ("checkpoint-000004", "final"):
        expected, actual = weights(one / folder), weights(sharded / folder)
        assert [*expected] == [*actual]
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    expected_state, actual_state = (
        state(each / "checkpoint-000004")["optimizer"] for each in (one, sharded)
    )
    assert actual_state["param_groups"] == expected_state["param_groups"]
    assert len(actual_state["state"]) == len(weights(one / "final"))
    for number, moments in actual_state["state"].items():
        for name, value in moments.items():
            other = expected_state["state"][number][name]
            torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-7)


@pytest.mark.thorough
def test_it_resumes_to_the_same_bits_and_without_fsdp_to_the_same_losses(
    config: TrainConfig, sharded: Path, tmp_path: Path
) -> None:
    for name in ("again", "alone"):
        shutil.copytree(sharded / "checkpoint-000002", tmp_path / name / "checkpoint-000002")
        shutil.copy(sharded / "losses.jsonl", tmp_path / name)
    messages = launch_run(config, tmp_path / "again")
    assert "at step 2" in messages and "sharded" in messages
    assert losses(tmp_path / "again") == losses(sharded)
    for folder in ("checkpoint-000004", "final"):
        assert same(weights(tmp_path / "again" / folder), weights(sharded / folder))
    before, now = (state(each / "checkpoint-000004") for each in (sharded, tmp_path / "again"))
    for number, moments in before["optimizer"]["state"].items():
        assert same(moments, now["optimizer"]["state"][number])
    for value, other in zip(
        *(each["average"]["shadow_params"] for each in (before, now)), strict=True
    ):
        assert torch.equal(value, other)

    run(replace(config, output=str(tmp_path / "alone")))
    assert losses(tmp_path / "alone") == pytest.approx(losses(sharded), rel=1e-6)


@pytest.mark.thorough
def test_each_process_keeps_its_part_and_all_skip_a_step_that_is_not_finite(
    config: TrainConfig, one: Path, tmp_path: Path
) -> None:
    # from a checkpoint that one process has written
    shutil.copytree(one / "checkpoint-000002", tmp_path / "out/checkpoint-000002")
    dump(replace(config, output=str(tmp_path / "out")), tmp_path / "config.yaml")
    launch("tests.train.sharded_state", tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("variables", "overrides", "expected"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], "asks for DeepSpeed .*Use FSDP"),
        ({"FSDP_VERSION": "1"}, [], r"fsdp_version=1: expected 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, [], "fsdp_offload_params.*Leave it out"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, [], "gradient_checkpointing=true"),
        ({"FSDP_IGNORED_MODULES": "unet"}, [], "fsdp_ignored_modules"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, [], "expected true or false"),
        ({}, ["mixed_precision=fp16"], r"mixed_precision=fp16 \(use bf16 or no\)"),
        ({}, ["optim.optimizer=adamw8bit", "compile=inductor"], "adamw8bit.*; compile=inductor"),
        ({}, ["validation_steps=5"], r"validation_steps=5 \(use 0\)"),
        ({}, ["channels_last=true"], "channels_last=true"),
        ({}, ["ray.address=auto"], "ray.address=auto"),
        ({}, ["ema.decay=0.9", "ema.on_cpu=true"], "ema.on_cpu=true"),
    ],
)
def test_what_does_not_work_is_refused_first(
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    overrides: list[str],
    expected: str,
) -> None:
    settings = ["data=/nowhere", "output=/nowhere", *overrides]
    config = load(TrainConfig, None, settings)
    check_config(config)  # without FSDP, these settings are right
    environment = {**launcher_environment("--fsdp_version", "2"), **variables}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=expected):
        check_config(config)


def test_the_launchers_defaults_are_accepted_but_for_the_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in launcher_environment("--fsdp_version", "2").items():
        monkeypatch.setenv(name, value)
    assert is_asked_for()
    check_sharding(TrainConfig())
    check_sharding(load(TrainConfig, "configs/train/sdxl.yaml", ["channels_last=false"]))
    for name, value in launcher_environment().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"Give --fsdp_version 2"):
        check_sharding(TrainConfig())
