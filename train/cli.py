"""`python -m train.cli`: train an adapter on FGID shards. Heavy imports wait until there is
something to do.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

    from configs.schema import TrainConfig

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

_HELP = """Train a ConsistentID adapter on FGID shards.

Settings are the YAML's, with [bold]key=value[/] on top; every key stands in configs/schema.py (TrainConfig).
The same command again goes on from the last checkpoint. Ctrl-C leaves one.

[bold]Examples[/]

  A few minutes' worth of proof on a laptop, from `make dataset`'s output:
    python -m train.cli --config configs/train/demo.yaml data=runs/dataset output=runs/train

  Stable Diffusion 1.5 on four GPUs, shards on an object store:
    accelerate launch --num_processes 4 -m train.cli --config configs/train/sd15.yaml \\\\
        data=s3://bucket/fgid output=runs/sd15 train_batch_size=4

  Longer, from where it ended:        … max_train_steps=20000
  From the published weights:         … adapter=ConsistentID-v1.bin model.mode=legacy
  Watch:                              tensorboard --logdir runs/sd15/logs

[bold]Leaves[/] under output: final/ (the adapter, for `make infer`), checkpoint-NNNNNN/, config.yaml, losses.jsonl,
summary.json, logs/. Exit status: 0 done, 2 something to mend, 130 stopped by Ctrl-C.
"""


@app.command(help=_HELP)
def main(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="A YAML preset.")
    ] = None,
) -> None:
    from configs.errors import PipelineError
    from configs.load import load
    from configs.schema import TrainConfig

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers are forked
    try:
        _train(load(TrainConfig, config, overrides or ()))
    except PipelineError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def _train(config: TrainConfig) -> None:
    import logging
    import warnings

    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    import diffusers
    import transformers

    for library in (diffusers, transformers):  # their bars for every file would bury ours
        library.utils.logging.disable_progress_bar()
    from train.trainer import train

    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not first or not sys.stderr.isatty()) as progress:
        outcome = train(config, _Bar(progress, config.max_train_steps, quiet=not first))
    if outcome.signal:
        typer.echo(
            f"stopped after step {outcome.step:,}; the same command goes on from there.", err=True
        )
        raise typer.Exit(128 + outcome.signal)
    if outcome.adapter is not None:
        noise, figures = outcome.summary["noise_loss"], outcome.summary
        typer.echo(
            f"{figures['steps']:,} steps, {figures['samples_per_second']} samples/s; noise loss "
            f"{noise['start']:.3f} → "
            f"{noise['end']:.3f} (means of the first and last tenth); adapter in {outcome.adapter}"
        )


class _Bar:
    """A progress bar; without a terminal, a line now and then."""

    def __init__(self, progress: Progress, total: int, *, quiet: bool) -> None:
        import time

        self._progress, self._total, self._quiet = progress, total, quiet
        self._task = progress.add_task("", total=total, loss="–", rate="", start=True)
        self._clock, self._began, self._done, self._told = time.monotonic, 0.0, 0, 0.0

    def say(self, message: str) -> None:
        if not self._quiet:
            typer.echo(message, err=True)

    def step(self, step: int, losses: dict[str, float] | None) -> None:
        now = self._clock()
        if not self._done:
            self._began = self._told = now
            self._progress.reset(self._task, total=self._total, completed=step)
        rate = self._done / (now - self._began) if now > self._began else 0.0
        self._done += 1
        self._progress.update(self._task, completed=step, rate=f"{rate:.1f} steps/s")
        if losses is None:
            return
        self._progress.update(self._task, loss=f"{losses['loss']:.4f}")
        if self._progress.disable and (now - self._told >= 10 or step == self._total):
            self._told = now
            left = (self._total - step) / rate if rate else 0
            self.say(
                f"step {step:,}/{self._total:,}  loss {losses['loss']:.4f}  {rate:.1f} steps/s  "
                f"{left:.0f} s left"
            )


if __name__ == "__main__":
    app()
