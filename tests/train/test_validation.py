"""Validation on the validation split, and the report of a training."""

from __future__ import annotations

import json
import math
import shutil
import signal
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.errors import ConfigError
from configs.training import (
    DataSource,
    EmaConfig,
    FeaturesConfig,
    OptimConfig,
    TrainConfig,
    ValidationConfig,
)
from tests.train.helpers import Listener, Steps, hold_out, keys, run, same, small, sources, weights
from train import report
from train.features.make import make_features
from train.history import read_lines
from train.outcome import Outcome
from train.report import write_report
from train.shards import ShardSet
from train.stopping import Stop
from train.trainer import Trainer


def validated(
    data: Path | tuple[DataSource, ...], base: Path, output: Path, **changes: Any
) -> TrainConfig:
    settings = ValidationConfig(samples=2, portraits=2, num_inference_steps=2)
    values = {"validation_steps": 2, "validation": settings, "max_train_steps": 4}
    return small(data, base, output, **{**values, **changes})


def test_held_out_people_are_measured_and_drawn_and_the_run_is_as_without(
    held_out: Path, tiny_base: Path, tmp_path: Path
) -> None:
    listener = Listener()
    with_validation = run(
        validated(held_out, tiny_base, tmp_path / "run", report_to="tensorboard"), listener
    )
    plain = run(validated(held_out, tiny_base, tmp_path / "plain", validation_steps=0))
    assert with_validation.adapter and plain.adapter
    assert same(weights(with_validation.adapter), weights(plain.adapter))
    lines = [*read_lines(tmp_path / "run/validation.jsonl")]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert line["gap"] == pytest.approx(line["swapped"] - line["right"]) and line["gap"] != 0
    assert sum("validation after step" in text for text in listener.messages) == 2
    for step in (2, 4):
        with Image.open(tmp_path / f"run/validation/{step:06d}.jpg") as sheet:
            assert sheet.size == (3 * 32, 2 * 32)  # photograph and two prompts; two people
    events = EventAccumulator(str(next((tmp_path / "run/logs").rglob("events*")).parent))
    events.Reload()
    assert "validation/gap" in events.Tags()["scalars"]
    assert "validation/portraits" in events.Tags()["images"]


def test_only_people_of_the_validation_side_are_shown(
    held_out: Path, tiny_base: Path, tmp_path: Path
) -> None:
    sides = {side: {*keys(ShardSet(str(held_out), side))} for side in ("train", "val")}
    with ExitStack() as stack:
        trainer = Trainer(validated(held_out, tiny_base, tmp_path / "run"), Listener(), stack)
        validation = trainer.validator._validation
        assert validation is not None and trainer.held_out is not None
        shown = {trainer.held_out.key(number) for number in validation._people}
        nothing = dict.fromkeys(("right", "swapped", "gap"), math.nan)
        trainer.validator._record(2, nothing, None)
    assert [*read_lines(tmp_path / "run/validation.jsonl")] == [
        {"step": 2, **dict.fromkeys(nothing, None)}
    ]
    assert len(shown) == 2
    assert shown <= sides["val"] and not shown & sides["train"]


def test_the_average_is_validated_and_the_weights_stay(
    held_out: Path, tiny_base: Path, tmp_path: Path
) -> None:
    ema = EmaConfig(decay=0.9)
    averaged = run(validated(held_out, tiny_base, tmp_path / "ema", ema=ema))
    plain = run(validated(held_out, tiny_base, tmp_path / "plain"))
    assert averaged.adapter and plain.adapter
    one, two = (weights(tmp_path / name / "checkpoint-000004") for name in ("ema", "plain"))
    assert same(one, two)
    lines = [[*read_lines(tmp_path / name / "validation.jsonl")] for name in ("ema", "plain")]
    assert lines[0][-1]["right"] != lines[1][-1]["right"]


def test_features_are_read_and_portraits_still_drawn(
    held_out: Path, tiny_base: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(held_out, tmp_path / "data"))
    features = FeaturesConfig(kinds=("vae", "image", "text"), dtype="float32")
    config = validated(own, tiny_base, tmp_path / "run", features=features)
    make_features(config, Steps())
    listener = Listener()
    run(config, listener)
    for kind in config.features.kinds:
        assert any(f"features: {kind} is read" in text for text in listener.messages), kind
    run(validated(held_out, tiny_base, tmp_path / "plain", keep_features=8))
    one, two = ([*read_lines(tmp_path / n / "validation.jsonl")] for n in ("run", "plain"))
    for with_features, without in zip(one, two, strict=True):
        assert with_features["right"] == pytest.approx(without["right"], rel=1e-4)
    assert (tmp_path / "run/validation/000004.jpg").is_file()


def test_two_held_out_people_are_needed(
    data: Path, held_out: Path, tiny_base: Path, tmp_path: Path
) -> None:
    alone = hold_out(Path(shutil.copytree(held_out, tmp_path / "data")), "b")
    for folder, count in ((data, "none"), (alone, "one")):
        text = rf"needs two people on the validation side, and .*/{folder.name}\) has {count}\."
        with pytest.raises(ConfigError, match=text):
            run(validated(folder, tiny_base, tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"split=all trains on it\. Set split=train"):
        run(validated(held_out, tiny_base, tmp_path / "run", split="all"))


@pytest.mark.parametrize("held_out_first", [True, False])
def test_a_data_set_without_held_out_people_is_left_out(
    featured: Path, tiny_base: Path, tmp_path: Path, held_out_first: bool
) -> None:
    with_val = hold_out(Path(shutil.copytree(featured, tmp_path / "data")), "b", "c")
    both = [*sources(with_val), *sources(featured)]
    # the people's regions differ, and so do the texts that a swapped identity is shown with
    config = validated(
        tuple(both if held_out_first else reversed(both)),
        tiny_base,
        tmp_path / "run",
        optim=OptimConfig(learning_rate=1e-30),  # the same weights, whatever it trains on
        features=FeaturesConfig(kinds=("vae", "image", "text"), dtype="float32"),
        validation=ValidationConfig(samples=2, portraits=0),
        max_train_steps=2,
    )
    listener = Listener()
    run(config, listener)
    assert sum(" is read " in text for text in listener.messages) == 3
    encoding = replace(config.features, use=False)
    plain = replace(config, output=str(tmp_path / "plain"), data=sources(with_val))
    run(replace(plain, features=encoding))
    one, two = (next(read_lines(tmp_path / n / "validation.jsonl")) for n in ("run", "plain"))
    assert one["right"] == pytest.approx(two["right"], rel=1e-4)
    assert one["swapped"] == pytest.approx(two["swapped"], rel=1e-4)


def interrupted(config: TrainConfig, step: int, listener: Listener) -> Outcome:
    """Runs until the validation after a step, which a signal then ends."""
    stop = Stop()
    with ExitStack() as stack:
        trainer = Trainer(config, listener, stack)

        def receive_signal(*_: Any) -> None:
            # only a validation computes without gradients
            if trainer.progress.step == step and not torch.is_grad_enabled():
                stop.signal = signal.SIGTERM

        trainer.trained.unet.register_forward_hook(receive_signal)
        return trainer.run(lambda: nullcontext(stop))


def test_a_signal_ends_a_validation_which_the_next_run_makes(
    held_out: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = validated(held_out, tiny_base, tmp_path / "run", report_to="tensorboard")
    whole = run(replace(config, output=str(tmp_path / "whole"), report_to="none"))
    for step in (2, 4):
        listener = Listener()
        outcome = interrupted(config, step, listener)
        assert (outcome.step, outcome.signal) == (step, signal.SIGTERM)
        assert f"validation after step {step}: interrupted" in "\n".join(listener.messages)
        lines = read_lines(tmp_path / "run/validation.jsonl")
        assert [line["step"] for line in lines] == [*range(2, step, 2)]
        assert (tmp_path / f"run/checkpoint-{step:06d}").is_dir()
        assert not (tmp_path / "run/final").exists()

    resumed = run(config)
    assert whole.adapter is not None and resumed.adapter is not None
    assert same(weights(whole.adapter), weights(resumed.adapter))
    for name in ("validation.jsonl", "validation/000002.jpg", "validation/000004.jpg"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    steps = set()
    for path in (tmp_path / "run/logs").rglob("events*"):
        events = EventAccumulator(str(path)).Reload()
        if "validation/gap" in events.Tags()["scalars"]:
            steps |= {value.step for value in events.Scalars("validation/gap")}
    assert steps == {2, 4}


class Links(HTMLParser):
    """Collects what a page would load, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def test_the_report_is_one_file_with_what_the_run_recorded(
    held_out: Path, tiny_base: Path, tmp_path: Path
) -> None:
    output = tmp_path / "<b>run"
    run(validated(held_out, tiny_base, output, log_every=1))
    page = (output / "report/index.html").read_text()
    links = Links()
    links.feed(page)
    assert links.loaded and all(each.startswith("data:image/jpeg") for each in links.loaded)
    for text in (
        "Training <b>run",
        "4 of 4",
        "projector, facial_encoder, identity_kv, lora",
        "noise_loss",
        "another person",
        "samples a second",
        "waiting for samples",
        "parts of a step, ms",
        "learning_rate: 0.001",
    ):
        assert text in links.text, text
    assert "<b>" not in page
    # written again from the run's own files, to the same bytes
    (output / "report/index.html").unlink()
    assert write_report(output).read_text() == page
    with pytest.raises(ConfigError, match="missing or empty"):
        write_report(tmp_path / "nothing")
    times = [*read_lines(output / "times.jsonl")]
    assert [line["step"] for line in times] == [1, 2, 3, 4]
    assert all(0 <= line["wait"] <= line["seconds"] for line in times)
    for line in times:
        assert [*line["parts"]] == ["encode", "forward", "backward", "optimizer"]
        assert min(line["parts"].values()) > 0
        assert sum(line["parts"].values()) + line["wait"] <= line["seconds"]


@pytest.mark.thorough
def test_a_validation_that_a_stop_left_out_is_made_up(
    held_out: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = validated(held_out, tiny_base, tmp_path / "run", checkpointing_steps=2)
    whole = run(config)
    lines = (tmp_path / "run/validation.jsonl").read_text()
    sheets = {step: (tmp_path / f"run/validation/{step:06d}.jpg").read_bytes() for step in (2, 4)}

    # as after a kill between the checkpoint and the validation of step 4
    (tmp_path / "run/validation.jsonl").write_text(lines.splitlines(keepends=True)[0])
    (tmp_path / "run/validation/000004.jpg").unlink()
    again = run(config)
    assert (tmp_path / "run/validation.jsonl").read_text() == lines
    assert (tmp_path / "run/validation/000004.jpg").read_bytes() == sheets[4]
    assert again.adapter == whole.adapter

    # another run from the checkpoint inherits what was validated before it
    first = str(tmp_path / "run/checkpoint-000002")
    run(replace(config, output=str(tmp_path / "other"), resume_from_checkpoint=first))
    assert (tmp_path / "other/validation.jsonl").read_text() == lines
    for step, sheet in sheets.items():
        assert (tmp_path / f"other/validation/{step:06d}.jpg").read_bytes() == sheet

    # steps that are trained again without validation have no lines of the weights before
    run(replace(config, validation_steps=0, resume_from_checkpoint="checkpoint-000002"))
    assert [line["step"] for line in read_lines(tmp_path / "run/validation.jsonl")] == [2]


def test_the_losses_of_a_long_run_are_shown_as_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_MOST_LINES", 4)
    path = tmp_path / "losses.jsonl"
    losses = [1.0, 2.0, None, None, None, None, 7.0]
    lines = [json.dumps({"step": n, "loss": loss}) for n, loss in enumerate(losses, 1)]
    path.write_text("".join(f"{line}\n" for line in lines))
    assert report._thinned(path) == [
        {"step": 2, "loss": 1.5},
        {"step": 4, "loss": None},
        {"step": 6, "loss": None},
        {"step": 7, "loss": 7.0},
    ]
