"""How long a training step takes, and what of it is waiting: `python -m bench.training data=OUT`.

The steps are the trainer's own, of any preset, on any device. `--random-base FOLDER` makes Stable
Diffusion 1.5 and CLIP ViT-H/14 at full size with random weights there (4 GB), which train at the
same speed as real ones, so nothing needs to be downloaded but CLIP's vocabulary.

Printed as JSON: the median of a step, of its wait for the loader's workers, and the longest wait
after the first steps; the most GPU memory; how much longer the step with a checkpoint took, and how
long its files were written in the background.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer

from bench.bases import make_base
from configs.load import load
from configs.training import TrainConfig
from train.packing import PackedBatch
from train.stopping import Stop
from train.trainer import Trainer

_WARMUP: Final = 5  # steps that are not measured


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE of the preset.")] = None,
    config: Annotated[Path, typer.Option(help="A preset.")] = Path("configs/train/sd15.yaml"),
    random_base: Annotated[
        Path | None, typer.Option(help="Folder for a base of random weights; made once.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Measured steps.")] = 40,
) -> None:
    """Measure the trainer's steps."""
    settings = load(TrainConfig, config, overrides or [])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if random_base is not None:
        if not random_base.exists():
            make_base(random_base, "sd15", device)
        settings = replace(settings, model=replace(settings.model, base=str(random_base)))
    with tempfile.TemporaryDirectory(prefix="training-") as folder, ExitStack() as stack:
        settings = replace(settings, output=folder, max_train_steps=steps + _WARMUP + 2)
        trainer = Trainer(settings, _Messages(), stack)
        print(json.dumps(measure(trainer, steps)))


def measure(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Takes steps, the last one with a checkpoint, and returns their times."""
    config, waits, seconds = trainer.config, list[float](), list[float]()
    with closing(trainer._batches()) as loaded:
        batches = _timed(loaded, waits)
        for step in range(_WARMUP + steps + 1):
            began = time.perf_counter()
            trainer._step(batches, Stop())
            trainer.progress.step += 1
            if step == _WARMUP + steps:
                trainer._save()
            if trainer.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    assert trainer.writer is not None
    began = time.perf_counter()
    trainer.writer.wait()
    written = time.perf_counter() - began
    accumulation, size = trainer.batch.accumulation, trainer.batch.size
    of_steps = [sum(waits[at : at + accumulation]) for at in range(0, len(waits), accumulation)]
    usual = statistics.median(seconds[_WARMUP:-1])
    return {
        "device": torch.cuda.get_device_name() if trainer.device.type == "cuda" else "cpu",
        "precision": config.mixed_precision,
        "workers": config.num_workers,
        "samples_a_step": size,
        "step_ms": round(1e3 * usual, 1),
        "samples_per_s": round(size / usual, 2),
        "wait_ms": round(1e3 * statistics.median(of_steps[_WARMUP:]), 2),
        "longest_wait_ms": round(1e3 * max(of_steps[_WARMUP:]), 1),
        "gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1)
        if trainer.device.type == "cuda"
        else 0,
        "checkpoint_pause_ms": round(1e3 * (seconds[-1] - usual), 1),
        "checkpoint_written_s": round(written, 2),
    }


def _timed(batches: Iterator[PackedBatch], waits: list[float]) -> Iterator[PackedBatch]:
    """Yields the batches; adds to `waits` how long each was waited for, in seconds."""
    while True:
        began = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - began)
        yield batch


class _Messages:
    """A train.outcome.Watcher."""

    def message(self, text: str) -> None:
        print(text, file=sys.stderr)

    def step(self, step: int, losses: dict[str, float] | None) -> None: ...


if __name__ == "__main__":
    typer.run(main)
