"""A dry run: two steps of a training, and from them what the whole would take. Nothing is kept."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final

import torch

from configs.errors import ConfigError
from configs.training import TrainConfig
from train.outcome import Watcher
from train.processes import peak_memory
from train.setup import check_config
from train.stopping import Stop
from train.trainer import Trainer

_STEPS: Final = 2  # the first one also allocates memory, and compiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """seconds: of each step that was taken. memory: the most that this process used, in bytes, of
    `device`. checkpoint: size of one, in bytes. samples: of a step. steps: of the whole run.
    """

    seconds: tuple[float, ...]
    memory: int
    device: str
    checkpoint: int
    samples: int
    steps: int

    def __str__(self) -> str:
        step = self.seconds[-1]
        whole = timedelta(seconds=round(step * self.steps))
        kind = "of the GPU" if self.device == "cuda" else "of this process"
        return (
            f"a step takes {step:.3g} s ({self.samples / step:.3g} samples/s; the first "
            f"{self.seconds[0]:.3g} s), and up to {self.memory / 1e9:.3g} GB {kind}\n"
            f"a checkpoint takes {self.checkpoint / 1e9:.3g} GB\n"
            f"{self.steps:,} steps would take {whole}, without validation and checkpoints"
        )


def dry_run(config: TrainConfig, watcher: Watcher) -> Estimate:
    """Loads data and models, and takes two steps, in a temporary output. Raises what training
    raises; ConfigError on Ray.
    """
    if config.ray.address:
        raise ConfigError(
            "a dry run takes its steps in this process: run it without ray.address on a machine "
            "like the workers'."
        )
    check_config(config)
    with tempfile.TemporaryDirectory(prefix="dry-run-") as folder, ExitStack() as stack:
        alone = replace(config, output=folder, work_folder="", resume_from_checkpoint="")
        trainer = Trainer(alone, watcher, stack)
        watcher.message(f"{trainer.batch}, on {trainer.device.type}")
        watcher.message(trainer.optimization.summary())
        seconds = []
        with closing(trainer._batches()) as loaded:
            batches = trainer._grouped(loaded)
            for _ in range(_STEPS):
                began = time.perf_counter()
                trainer._step(batches, Stop())
                trainer.progress.step += 1
                if trainer.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
        return Estimate(
            seconds=tuple(seconds),
            memory=peak_memory(trainer.device),
            device=trainer.device.type,
            checkpoint=_size(trainer.trained.adapter.state_dict())
            + _size(trainer.optimization.state_dict()),
            samples=trainer.batch.size,
            steps=config.max_train_steps,
        )


def _size(value: Any) -> int:
    """Returns the bytes of all tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0
