"""Training an adapter for SDXL, on a base of its shape at toy size."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import load
from configs.training import ModelConfig, TrainConfig, ValidationConfig
from model.forms import expected_state
from model.spec import SPECS
from tests.infer.helpers import TINY_XL, make_tiny_xl
from tests.train.featured import features, losses, make
from tests.train.helpers import Listener, run, same, small, weights
from train.history import read_lines
from train.trainer import Trainer


@pytest.fixture(scope="module")
def tiny_xl(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_xl(tmp_path_factory.mktemp("xl"), tiny_base)


@pytest.fixture(autouse=True)
def _toy_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPECS, "sdxl", replace(TINY_XL, name="sdxl"))


def xl(data: Path, base: Path, output: Path, **changes: Any) -> TrainConfig:
    values = {"model": ModelConfig(spec="sdxl", base=str(base), device="cpu"), "max_train_steps": 4}
    return small(data, base, output, **{**values, **changes})


def test_the_preset_is_valid_and_trains_as_many_parameters_as_published(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = load(TrainConfig, "configs/train/sdxl.yaml", ["data=a", "output=b"])
    assert (config.model.spec, config.resolution) == ("sdxl", 1024)
    monkeypatch.undo()
    count = sum(value.numel() for value in expected_state(SPECS["sdxl"]).values())
    assert count == 868_832_256


@pytest.mark.parametrize("buckets", [False, True])
def test_a_run_starts_trains_and_resumes_to_the_same_weights(
    data: Path, shaped: Path, tiny_xl: Path, tmp_path: Path, buckets: bool
) -> None:
    samples = shaped if buckets else data
    changes = {"checkpointing_steps": 2, "buckets": buckets, "split": "all"}
    config = xl(samples, tiny_xl, tmp_path / "run", **changes)
    straight = run(config)
    shutil.copytree(tmp_path / "run/checkpoint-000002", tmp_path / "again/checkpoint-000002")
    resumed = run(replace(config, output=str(tmp_path / "again")))
    assert straight.adapter is not None and resumed.adapter is not None
    assert same(weights(straight.adapter), weights(resumed.adapter))
    first, last = weights(tmp_path / "run/checkpoint-000002"), weights(straight.adapter)
    changed = [key for key, value in first.items() if not torch.equal(value, last[key])]
    assert len(changed) > 0.9 * len(first)


def test_float32_features_of_both_text_encoders_give_the_bits_of_a_run_without(
    data: Path, tiny_xl: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(data, tmp_path / "data"))
    config = xl(own, tiny_xl, tmp_path / "cached", features=features(kinds=("text",)))
    config = replace(config, keep_features=8)
    [folder] = make(config)
    listener = Listener()
    run(config, listener)
    assert any("features: text is read" in text for text in listener.messages)
    run(replace(config, features=features(use=False), output=str(tmp_path / "plain")))
    assert losses(tmp_path / "cached") == losses(tmp_path / "plain")
    settings = json.loads((folder / "features.json").read_text())
    assert {"encoder", "encoder_2", "tokenizer", "tokenizer_2"} < settings.keys()


def test_sizes_reach_the_unet(data: Path, tiny_xl: Path, tmp_path: Path) -> None:
    sizes: list[list[list[float]]] = []
    losses = {}
    for name in ("true", "fixed"):
        model = ModelConfig(spec="sdxl", base=str(tiny_xl), device="cpu", sizes=name)  # type: ignore[arg-type]
        config = xl(data, tiny_xl, tmp_path / name, model=model, max_train_steps=1)
        with ExitStack() as stack:
            trainer = Trainer(config, Listener(), stack)
            trainer.trained.unet.register_forward_pre_hook(
                lambda _, __, options: sizes.append(
                    options["added_cond_kwargs"]["time_ids"].tolist()
                ),
                with_kwargs=True,
            )
            trainer.run()
        losses[name] = next(read_lines(tmp_path / name / "losses.jsonl"))["loss"]
    assert sizes[1] == [[32, 32, 0, 0, 32, 32]] * 2
    assert all(row[4:] == [32, 32] and row[:2] == [1024, 1024] for row in sizes[0])
    assert losses["true"] != losses["fixed"]


def test_held_out_people_are_measured_and_drawn(
    held_out: Path, tiny_xl: Path, tmp_path: Path
) -> None:
    settings = ValidationConfig(samples=2, portraits=1, num_inference_steps=2)
    changes = {"max_train_steps": 2, "validation_steps": 2, "validation": settings}
    run(xl(held_out, tiny_xl, tmp_path / "run", **changes))
    (line,) = read_lines(tmp_path / "run/validation.jsonl")
    assert line["gap"] != 0 and (tmp_path / "run/validation/000002.jpg").is_file()
