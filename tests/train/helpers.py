"""Small training runs, and their models and batches without a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch

from configs.training import LossConfig, ModelConfig, OptimConfig, TrainConfig
from model.spec import SPECS
from train.data import BatchMaker, TrainBatch, unpacked
from train.order import SampleOrder
from train.outcome import Outcome
from train.setup import make_models, make_preparation
from train.shards import ShardSet
from train.step import Frozen, TrainedModel
from train.trainer import train


def small(data: Path, base: Path, output: Path, **changes: object) -> TrainConfig:
    """Returns settings for ten steps of two samples at 32 pixels, on the CPU, without a worker."""
    values: dict[str, object] = {
        "data": str(data),
        "output": str(output),
        "model": ModelConfig(spec="tiny", base=str(base), device="cpu"),
        "optim": OptimConfig(learning_rate=1e-3, lr_scheduler="cosine", lr_warmup_steps=2),
        "loss": LossConfig(drop_text=0.1, drop_identity=0.1, drop_both=0.1),
        "resolution": 32,
        "global_batch_size": 2,
        "micro_batch_size": 2,
        "max_train_steps": 10,
        "num_workers": 0,
        "log_every": 2,
        "seed": 3,
        "keep_samples": 8,
        "report_to": "none",
    }
    return TrainConfig(**{**values, **changes})  # type: ignore[arg-type]


class Listener:
    """A train.trainer.Watcher that records messages and losses, and calls `on_step`."""

    def __init__(self, on_step: Callable[[int], None] = lambda step: None) -> None:
        self.messages: list[str] = []
        self.losses: list[tuple[int, dict[str, float]]] = []
        self._on_step = on_step

    def message(self, text: str) -> None:
        self.messages.append(text)

    def step(self, step: int, losses: dict[str, float] | None) -> None:
        self._on_step(step)
        if losses is not None:
            self.losses.append((step, losses))


def run(config: TrainConfig, listener: Listener | None = None) -> Outcome:
    return train(config, listener or Listener())


class Parts:
    """The models and the batch maker of a run, without a Trainer."""

    def __init__(self, config: TrainConfig, shards: ShardSet) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.frozen: Frozen
        self.trained: TrainedModel
        self.frozen, self.trained = make_models(
            config, SPECS["tiny"], config.model.base, torch.device("cpu")
        )
        self.preparation = make_preparation(config, SPECS["tiny"], self.frozen)
        self.maker = BatchMaker(shards, SampleOrder([len(shards)], config.seed), self.preparation)
        self._random = torch.get_rng_state()

    def make(self, positions: range) -> TrainBatch:
        return unpacked(self.maker(positions), self.preparation, "cpu")

    def copy(self) -> Parts:
        """The same models with weights of their own, and torch's random state as it was."""
        torch.set_rng_state(self._random)
        shared = (self.frozen.base.tokenizer, self.maker)
        return deepcopy(self, {id(each): each for each in shared})
