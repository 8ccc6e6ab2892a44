"""Loss spikes: which samples are named, and when none is; a planted bad picture."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.training import DataSource, LossConfig
from tests.train.helpers import Listener, keys, run, small
from tests.train.poison import base_that_shows_pictures, grey, noise, with_pictures
from train.history import read_lines
from train.losses import FetchedLosses
from train.replay import replay
from train.shards import ShardSet
from train.spikes import SPIKES, SpikeCheck, SpikeContext

BATCH = 16
STEPS = 400


def losses(steps: int, seed: int = 0) -> FetchedLosses:
    """Losses that depend on the timestep by a factor of 300 and on the background, and fall."""
    random = np.random.default_rng(seed)
    timesteps = random.integers(0, 1000, (steps, BATCH))
    noise = (0.003 + np.exp(-timesteps / 100)) * random.lognormal(0, 0.4, (steps, BATCH))
    step = np.arange(1, steps + 1)[:, None]
    noise *= np.where(step % 2, 1, 0.3) * (1 + 3 * np.exp(-step / 50))
    errors = np.stack((noise - 0.005, noise, np.full_like(noise, -0.5)), 2).astype(np.float32)
    return FetchedLosses(values=errors.mean(1), errors=errors, timesteps=timesteps)


def check(output: Path, messages: list[str], step: int, state: object = None) -> SpikeCheck:
    context = SpikeContext(
        output=output,
        name="s3://bucket/run",
        batch=BATCH,
        names_at=lambda position: (f"key-{position}", "tar"),
        masked=lambda step: step % 2 == 0,
        message=messages.append,
    )
    return SpikeCheck(context, step, state)  # type: ignore[arg-type]


def feed(spikes: SpikeCheck, all_losses: FetchedLosses, start: int, stop: int, window: int) -> None:
    """Adds the steps after `start`, up to `stop`, as many at a time as `window` says."""
    for first in range(start, stop, window):
        part = slice(first, min(stop, first + window))
        fetched = FetchedLosses(
            values=all_losses.values[part],
            errors=all_losses.errors[part],
            timesteps=all_losses.timesteps[part],
        )
        spikes.add(first + 1, first * BATCH, fetched)


def test_ordinary_losses_are_rarely_spikes(tmp_path: Path) -> None:
    messages: list[str] = []
    feed(check(tmp_path, messages, 0), losses(5_000), 0, 5_000, 20)
    assert len(messages) == len([*read_lines(tmp_path / SPIKES)]) <= 2  # of 80,000 samples


@pytest.mark.parametrize("timestep", [20, 500, 990])
def test_a_planted_sample_is_named_first_at_any_timestep(tmp_path: Path, timestep: int) -> None:
    fetched, messages = losses(STEPS), list[str]()
    step, place = 301, 5
    normal = 0.003 + np.exp(-timestep / 100)
    fetched.timesteps[step - 1, place] = timestep
    fetched.errors[step - 1, place, :2] = 40 * normal
    # higher, but normal at its timestep; a sample that was left out; one that isn't finite
    fetched.timesteps[step - 1, 0] = 0
    fetched.errors[step - 1, 0, :2] = max(1.0, fetched.errors[step - 1, 0, 1])
    fetched.errors[step - 1, 1] = 0
    fetched.errors[step - 1, 2] = np.nan
    feed(check(tmp_path, messages, 0), fetched, 0, STEPS, 20)
    [line] = read_lines(tmp_path / SPIKES)
    key = f"key-{(step - 1) * BATCH + place}"
    assert line["step"] == step and line["samples"][0]["key"] == key
    assert line["samples"][0]["timestep"] == timestep
    assert line["samples"][0]["noise_loss"] == pytest.approx(40 * normal)
    assert 15 < line["samples"][0]["times"] < 100
    times = [sample["times"] for sample in line["samples"]]
    assert times == sorted(times, reverse=True) and len(times) == BATCH - 2
    [message] = messages
    assert message.startswith(f"step {step}: ") and f": {key} (" in message
    assert f"make replay OUT=s3://bucket/run STEP={step}" in message


def test_the_same_is_listed_however_steps_are_fetched_and_after_a_resume(tmp_path: Path) -> None:
    fetched = losses(STEPS)
    for step in (120, 207, 208, 209, 390):
        fetched.errors[step - 1, step % BATCH, :2] *= 60
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir(), other.mkdir()
    messages: list[str] = []
    feed(check(one, messages, 0), fetched, 0, STEPS, STEPS)
    assert len(messages) == 1 and "4 more of these steps" in messages[0]
    first = check(other, [], 0)
    feed(first, fetched, 0, 207, 3)
    stream = io.BytesIO()
    torch.save(first.state(), stream)
    feed(first, fetched, 207, 250, 1)  # lost in a kill
    stream.seek(0)
    resumed = check(other, [], 207, torch.load(stream, weights_only=True))
    feed(resumed, fetched, 207, STEPS, 7)
    lines = [*read_lines(one / SPIKES)]
    assert [line["step"] for line in lines] == [120, 207, 208, 209, 390]
    assert lines == [*read_lines(other / SPIKES)]


def test_a_picture_of_noise_is_the_first_that_is_named_in_a_run_and_by_replay(
    data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    others = with_pictures(data, tmp_path / "grey-0", [grey] * 8)
    links = [tmp_path / f"grey-{number}" for number in (1, 2)]
    for link in links:
        link.symlink_to(others)
    poisoned = with_pictures(data, tmp_path / "poisoned", [grey] * 4 + [noise] + [grey] * 3)
    config = small(
        poisoned,
        base_that_shows_pictures(tiny_base, tmp_path / "base", 16),
        tmp_path / "out",
        split="all",
        global_batch_size=32,  # of 32 samples, among which one is noise
        micro_batch_size=32,
        keep_samples=32,
        resolution=16,
        max_train_steps=18,
        checkpointing_steps=16,
        loss=LossConfig(mask_loss_prob=0),
        verify_samples=False,
    )
    folders = (others, *links, poisoned)
    listener = Listener()
    run(replace(config, data=tuple(DataSource(path=str(path)) for path in folders)), listener)
    key, shard = keys(ShardSet(str(data)))[4], f"{poisoned}/shards/fgid-000001.tar"
    lines = [*read_lines(tmp_path / "out" / SPIKES)]
    assert [line["step"] for line in lines] == [17, 18]
    for line in lines:
        first, second = line["samples"][:2]
        assert (first["key"], first["shard"]) == (key, shard) and first["times"] > 10
        assert second["times"] < 3 or second["shard"] == shard
    announced = [text for text in listener.messages if "far above the median" in text]
    assert len(announced) == 1 and f": {key} (" in announced[0] and "STEP=1" in announced[0]
    result = replay(tmp_path / "out", 17)
    assert result.equal and (result.samples[0].key, result.samples[0].shard) == (key, shard)
    assert result.samples[0].losses["noise_loss"] == lines[0]["samples"][0]["noise_loss"]
