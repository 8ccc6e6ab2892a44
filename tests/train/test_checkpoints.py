"""Checkpoints in the background, a full disk, and which checkpoints are removed."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError, StoreError
from configs.training import OptimConfig, TrainConfig
from tests.train.helpers import Listener, Parts, run, same, small, weights
from train.checkpoints import checkpoints, damage, remove_partial_folders, write_file_list
from train.history import read_lines
from train.segments import read_segments
from train.state import AdapterExtras, Snapshot, load_checkpoint
from train.writer import CheckpointWriter

# waits in a thread, as for a slow disk, after a signal
_WAITING = """
import ctypes, threading, time
from train.stopping import stop_on_signal
mutex = ctypes.create_string_buffer(128)
with stop_on_signal() as stop:
    print("ready", flush=True)
    while not stop.signal:
        time.sleep(0.01)
    print("stopping", flush=True)
    for _ in range(2):  # a lock in C, for which signals end no waiting
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def settings(data: Path, base: Path, output: Path, **changes: object) -> TrainConfig:
    optim = OptimConfig(learning_rate=1e-3, lr_scheduler="constant")
    return small(data, base, output, **{"optim": optim, **changes})


@pytest.fixture(scope="module")
def five(data: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of ten steps with five checkpoints."""
    output = tmp_path_factory.mktemp("runs") / "five"
    run(settings(data, tiny_base, output, checkpointing_steps=2, checkpoints_total_limit=0))
    return output


@pytest.fixture
def output(five: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(five, tmp_path / "out"))


@pytest.fixture
def file_limit() -> Iterator[int]:
    """The limit on the size of files, which is restored after the test."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield before[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(output: Path) -> list[str]:
    return [path.name for path in checkpoints(output)]


def spoil(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_later_steps_do_not_change_a_snapshot(parts: Parts, tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW(parts.trained.adapter.parameters(), lr=1e-2)

    def step() -> None:
        for parameter in parts.trained.adapter.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    step()
    before = {key: value.clone() for key, value in parts.trained.adapter.state_dict().items()}
    moments = [entry["exp_avg"].clone() for entry in optimizer.state.values()]
    extras = AdapterExtras(metadata={}, dataset="")
    state = {"step": 1, "optimizer": optimizer.state_dict()}
    snapshot = Snapshot(parts.trained, extras, state, {})
    step()
    CheckpointWriter(tmp_path, 1, print).write(snapshot)
    restored = load_checkpoint(tmp_path / "checkpoint-000001", parts.trained)
    assert same(before, parts.trained.adapter.state_dict())
    written = [entry["exp_avg"] for entry in restored["optimizer"]["state"].values()]
    assert all(torch.equal(*pair) for pair in zip(moments, written, strict=True))


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits(
    output: Path, data: Path, tiny_base: Path
) -> None:
    released, events = threading.Event(), list[str]()

    class Slow(Listener):
        """Keeps the thread in its message until step 7 is done."""

        def message(self, text: str) -> None:
            if text.startswith("removed:"):
                released.wait(30)
                events.append("written")

        def step(self, step: int, losses: dict[str, float] | None) -> None:
            events.append(f"step {step}")
            if step == 7:
                released.set()

    config = settings(data, tiny_base, output, checkpointing_steps=3, max_train_steps=9)
    run(replace(config, resume_from_checkpoint="checkpoint-000004"), Slow())
    assert [e for e in events if e != "written"] == [f"step {step}" for step in range(5, 10)]
    assert events.index("step 7") < events.index("written") < events.index("step 9")


@pytest.mark.parametrize("file", ["adapter.safetensors", "state.pt"])
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(
    five: Path, data: Path, tiny_base: Path, tmp_path: Path, file: str, file_limit: int
) -> None:
    room = (five / "checkpoint-000002" / file).stat().st_size - 1
    # the file before state.pt fits
    assert file == "adapter.safetensors" or room > (
        (five / "checkpoint-000002/adapter.safetensors").stat().st_size
    )
    steps: list[int] = []

    def fill_disk(step: int) -> None:
        steps.append(step)
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, file_limit))

    config = settings(data, tiny_base, tmp_path / "out", checkpointing_steps=2, max_train_steps=6)
    with pytest.raises(StoreError, match=r"checkpoint-000004 can't be written: .*Free disk space"):
        run(config, Listener(fill_disk))
    assert steps[-1] < 6  # noticed at the next step, or where the next checkpoint begins
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    assert names(tmp_path / "out") == ["checkpoint-000002"]
    assert not damage(tmp_path / "out/checkpoint-000002")
    assert not list((tmp_path / "out").glob(".*"))
    if file == "state.pt":
        run(config)
        ends = tmp_path / "out/checkpoint-000006", five / "checkpoint-000006"
        assert same(*map(weights, ends))


def test_lines_are_on_the_disk_before_the_checkpoint(parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "losses.jsonl").symlink_to("nowhere")  # can't be written to the disk
    extras = AdapterExtras(metadata={}, dataset="")
    with pytest.raises(StoreError, match=r"losses\.jsonl"):
        CheckpointWriter(tmp_path, 1, print).write(Snapshot(parts.trained, extras, {"step": 1}, {}))
    assert names(tmp_path) == []


def test_a_damaged_later_checkpoint_does_not_cost_the_new_one(
    output: Path, data: Path, tiny_base: Path
) -> None:
    spoil(output / "checkpoint-000010/state.pt")
    config = settings(data, tiny_base, output, max_train_steps=9, checkpoints_total_limit=1)
    listener = Listener()
    assert run(config, listener).step == 9
    assert names(output) == ["checkpoint-000009"] and not damage(output / "checkpoint-000009")
    damaged, later = listener.messages[:2]
    assert "state.pt is not as it was written" in damaged
    assert later.startswith("checkpoint-000010 in") and "are renamed to" in later


def test_checkpoints_that_a_resumed_run_passed_over_are_removed_with_its_first_one(
    output: Path, five: Path, data: Path, tiny_base: Path
) -> None:
    config = settings(
        data,
        tiny_base,
        output,
        max_train_steps=7,
        checkpointing_steps=3,
        checkpoints_total_limit=2,
        resume_from_checkpoint="checkpoint-000004",
    )
    before: list[list[str]] = []
    listener = Listener(lambda step: before.append(names(output)) if step == 5 else None)
    run(config, listener)
    assert before == [["checkpoint-000002", "checkpoint-000004"]]
    assert not list(output.glob("replaced-*"))
    assert names(output) == ["checkpoint-000006", "checkpoint-000007"]
    assert "checkpoint-000006, checkpoint-000008, checkpoint-000010 in" in listener.messages[0]
    # the same command continues, although the checkpoint that it names is gone
    listener = Listener()
    outcome = run(replace(config, max_train_steps=10), listener)
    assert "checkpoint-000007 continues checkpoint-000004" in listener.messages[0]
    assert outcome.adapter and same(weights(outcome.adapter), weights(five / "final"))


def test_a_run_that_dies_before_its_first_checkpoint_leaves_records_of_its_own_steps(
    output: Path, data: Path, tiny_base: Path
) -> None:
    def die(step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    config = settings(data, tiny_base, output, max_train_steps=11)
    with pytest.raises(KeyboardInterrupt):
        run(replace(config, resume_from_checkpoint="checkpoint-000004"), Listener(die))
    listener = Listener()
    assert run(config, listener).step == 11
    assert "at step 4" in listener.messages[0]
    assert [line["step"] for line in read_lines(output / "losses.jsonl")] == [*range(1, 12)]
    assert [segment.step for segment in read_segments(output)] == [0, 4]


def test_an_older_checkpoint_at_the_last_step_costs_no_later_one(
    output: Path, data: Path, tiny_base: Path
) -> None:
    before = (output / "losses.jsonl").read_bytes(), names(output)
    config = settings(data, tiny_base, output, resume_from_checkpoint="checkpoint-000004")
    with pytest.raises(ConfigError, match="checkpoint-000004 has all max_train_steps=4 steps"):
        run(replace(config, max_train_steps=4))
    assert ((output / "losses.jsonl").read_bytes(), names(output)) == before


def test_a_checkpoint_that_was_being_replaced_is_moved_back(output: Path) -> None:
    (output / "checkpoint-000010").rename(output / ".checkpoint-000010.77.old")
    shutil.copytree(output / "checkpoint-000008", output / ".checkpoint-000008.77.old")
    (output / ".checkpoint-000010.77.partial").mkdir()
    remove_partial_folders(output)
    assert names(output)[-1] == "checkpoint-000010" and not list(output.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_wait_for_a_library(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", _WAITING], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in ("ready", "stopping"):
        assert process.stdout.readline().strip() == line
        process.send_signal(number)
        time.sleep(2.1)  # a signal that comes earlier is taken for the first one again
    assert process.wait(timeout=20) == 128 + number


def test_any_changed_byte_of_the_list_of_files_is_damage(tmp_path: Path) -> None:
    (tmp_path / "adapter.json").write_text("{}")
    write_file_list(tmp_path)
    assert damage(tmp_path) == ""
    whole = (tmp_path / "files.json").read_bytes()
    for index in range(len(whole.rstrip())):
        content = bytearray(whole)
        content[index] ^= 1
        (tmp_path / "files.json").write_bytes(content)
        # a blank between two entries may be any other kind of blank
        assert damage(tmp_path) or json.loads(content) == json.loads(whole), index
