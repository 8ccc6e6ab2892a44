"""`python -m train.cli`: train an adapter on FGID shards.

Large libraries are imported inside functions, so that --help answers at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

    from configs.training import TrainConfig

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Train a ConsistentID adapter on FGID shards.",
)

_RUN_HELP = """Train a ConsistentID adapter on FGID shards.

[bold]key=value[/] overrides the YAML; configs/training.py (TrainConfig) lists every setting.
Ctrl-C writes a checkpoint and stops. The same command again resumes from the last checkpoint.

[bold]Examples[/]

  A test on a laptop, some minutes, with the output of `make dataset`:
    python -m train.cli run --config configs/train/demo.yaml data=runs/dataset output=runs/train

  Stable Diffusion 1.5 on four GPUs, shards on an object store:
    accelerate launch --num_processes 4 -m train.cli run --config configs/train/sd15.yaml \\\\
        data=s3://bucket/fgid output=runs/sd15 micro_batch_size=4

  Several data sets:                  … 'data=[{path: a}, {path: b}]'
  Continue a finished run:            … max_train_steps=20000
  Start from the published weights:   … adapter=ConsistentID-v1.bin model.mode=legacy
  Show the losses:                    tensorboard --logdir runs/sd15/logs

[bold]Output[/] folder: final/ (the adapter, for `make infer`), checkpoint-NNNNNN/, config.yaml,
losses.jsonl, summary.json, logs/.

Exit status: 0 finished, 2 wrong settings, data or weights, 130 stopped by Ctrl-C.
"""


@app.callback()
def commands() -> None:
    """Makes `run` a command of its own even while there is no other."""


@app.command(help=_RUN_HELP)
def run(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="A YAML preset.")
    ] = None,
) -> None:
    from configs.errors import PipelineError, user_message
    from configs.load import load
    from configs.training import TrainConfig

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers are forked
    try:
        _train(load(TrainConfig, config, overrides or ()))
    except (PipelineError, OSError) as error:
        if (message := user_message(error)) is None:
            raise
        typer.echo(f"error: {message}", err=True)
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

    for library in (diffusers, transformers):  # they show a progress bar for each file
        library.utils.logging.disable_progress_bar()
    from train.trainer import train

    is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not is_first or not sys.stderr.isatty()) as progress:
        outcome = train(config, _ProgressBar(progress, config.max_train_steps, quiet=not is_first))
    if outcome.signal:
        typer.echo(
            f"stopped after step {outcome.step:,}; the same command resumes from there.", err=True
        )
        raise typer.Exit(128 + outcome.signal)
    if outcome.adapter is not None:
        summary, noise = outcome.summary, outcome.summary["noise_loss"]
        typer.echo(
            f"{summary['steps']:,} steps, {summary['samples_per_second']} samples/s; noise loss "
            f"{noise['start']:.3f} → {noise['end']:.3f} (means over the first and the last tenth "
            f"of the steps); adapter in {outcome.adapter}"
        )


class _ProgressBar:
    """A train.trainer.Watcher: a progress bar; without a terminal, a line every ten seconds.

    quiet: no messages, for all processes but the first.
    """

    def __init__(self, progress: Progress, total: int, *, quiet: bool) -> None:
        import time

        self._progress, self._total, self._quiet = progress, total, quiet
        self._task = progress.add_task("", total=total, loss="–", rate="", start=True)
        self._clock = time.monotonic
        self._started = self._last_line = 0.0  # seconds by the clock
        self._steps_done = 0  # in this run, not in those before a resume

    def message(self, text: str) -> None:
        if not self._quiet:
            typer.echo(text, err=True)

    def step(self, step: int, losses: dict[str, float] | None) -> None:
        now = self._clock()
        if not self._steps_done:
            self._started = self._last_line = now
            self._progress.reset(self._task, total=self._total, completed=step)
        rate = self._steps_done / (now - self._started) if now > self._started else 0.0
        self._steps_done += 1
        self._progress.update(self._task, completed=step, rate=f"{rate:.1f} steps/s")
        if losses is None:
            return
        self._progress.update(self._task, loss=f"{losses['loss']:.4f}")
        if self._progress.disable and (now - self._last_line >= 10 or step == self._total):
            self._last_line = now
            remaining = (self._total - step) / rate if rate else 0
            self.message(
                f"step {step:,}/{self._total:,}  loss {losses['loss']:.4f}  {rate:.1f} steps/s  "
                f"{remaining:.0f} s left"
            )


if __name__ == "__main__":
    app()
