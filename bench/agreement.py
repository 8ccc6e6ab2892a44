"""What it costs that all processes agree on stopping at every step: `python -m bench.agreement`.

Two gloo processes train the tiny model. In every other step, the numbers that the processes add up
(train/facts.py) are not sent, so both kinds of steps are measured in one run. The output is the
median time of a step with and without, and of the operation by itself, in milliseconds; of the
latter also the limit of the fastest tenth, which other programs on the machine affect less.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

_WARMUP = 10  # steps that are not measured
_ALONE = 500  # repetitions of the operation by itself


def main(
    steps: Annotated[int, typer.Option(min=2, help="Steps of each kind.")] = 200,
    processes: Annotated[int, typer.Option(min=2)] = 2,
    preset: Annotated[Path | None, typer.Option(hidden=True, help="Of a process.")] = None,
) -> None:
    """Measure the cost of agreeing on every step."""
    if preset is not None:
        measure(preset, steps)
        return
    from tests.chaos.train.inputs import make_preset

    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory(prefix="agreement-") as folder:
        own = ["bench.agreement", "--steps", str(steps), "--preset", str(make_preset(Path(folder)))]
        subprocess.run(
            [sys.executable, "-m", *launcher, "-m", *own],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
        )


def measure(preset: Path, steps: int) -> None:
    """Trains in one of the processes; the first one prints the result."""
    import torch
    import transformers
    from torch import distributed

    from configs.load import load
    from configs.training import TrainConfig
    from train.stopping import Stop
    from train.trainer import Trainer

    transformers.utils.logging.disable_progress_bar()
    total = 2 * (steps + _WARMUP)
    config = replace(
        load(TrainConfig, preset),
        output=str(preset.parent / "out"),
        max_train_steps=total,
        log_keys=False,
        keep_samples=16,
        num_workers=0,
    )
    with ExitStack() as stack:
        trainer = Trainer(config, _Silent(), stack)
        send = trainer.accelerator.reduce
        seconds: tuple[list[float], list[float]] = ([], [])  # without, with
        batches, stop = trainer._batches(), Stop()
        for step in range(total):
            is_sent = bool(step % 2)
            trainer.accelerator.reduce = send if is_sent else _added_here(trainer.batch.world)
            distributed.barrier()
            began = time.perf_counter()
            trainer._step(batches, stop)
            trainer.progress.step += 1
            seconds[is_sent].append(time.perf_counter() - began)
        alone = []
        for _ in range(_ALONE):
            distributed.barrier()
            began = time.perf_counter()
            send(torch.zeros(2), "sum")
            alone.append(time.perf_counter() - began)
        if trainer.is_main:
            without, sent = (statistics.median(each[_WARMUP:]) for each in seconds)
            by_pairs = [b - a for a, b in zip(*seconds, strict=True)][_WARMUP:]
            result = {
                "steps": steps,
                "step_without_ms": round(1e3 * without, 3),
                "step_with_ms": round(1e3 * sent, 3),
                "difference_of_pairs_ms": round(1e3 * statistics.median(by_pairs), 3),
                "share_percent": round(100 * statistics.median(by_pairs) / without, 2),
                "alone_ms": round(1e3 * statistics.median(alone), 3),
                "alone_fastest_tenth_ms": round(1e3 * statistics.quantiles(alone, n=10)[0], 3),
            }
            print(json.dumps(result))


def _added_here(world: int) -> Any:
    """Returns what takes the place of `Accelerator.reduce`: equal numbers are added up."""
    return lambda tensor, _reduction: tensor * world


class _Silent:
    """A train.outcome.Watcher."""

    def message(self, text: str) -> None: ...

    def step(self, step: int, losses: dict[str, float] | None) -> None: ...


if __name__ == "__main__":
    typer.run(main)
