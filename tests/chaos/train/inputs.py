"""A small data set, a base model, and settings for training on them."""

from __future__ import annotations

from pathlib import Path

import transformers

from configs.load import dump
from configs.training import DataSource, ModelConfig, OptimConfig, TrainConfig
from model.tiny import make_tiny_base
from stages.backends.weights import Weights
from tests.chaos.command import run_command, succeed
from tests.chaos.train.plans import GLOBAL_BATCH

STEPS = 20
PORTRAITS = 11  # samples, so that epochs begin within steps


def make_preset(folder: Path) -> Path:
    """Makes them in `folder`; returns the file with the settings, which lack an output."""
    photos, data, base = folder / "photos", folder / "data", folder / "base"
    succeed(["synthesize", "--count", str(PORTRAITS), "--seed", "11", str(photos)])
    # small images are decoded fast
    succeed(run_command(photos, data, "executor=inline", "resize.size=256"))
    transformers.utils.logging.disable_progress_bar()
    make_tiny_base(base, Weights().fetch("clip_bpe"), 0)
    config = TrainConfig(
        data=(DataSource(path=str(data)),),
        split="all",
        model=ModelConfig(spec="tiny", base=str(base), device="cpu"),
        optim=OptimConfig(learning_rate=1e-3, lr_warmup_steps=2),
        resolution=32,
        global_batch_size=GLOBAL_BATCH,
        max_train_steps=STEPS,
        checkpointing_steps=3,
        threads=1,
        log_every=2,
        log_keys=True,
        seed=3,
        report_to="none",
    )
    dump(config, folder / "preset.yaml")
    return folder / "preset.yaml"
