"""`python -m train.base_model run`: trains a small base model on FGID shards."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from train.cli import quiet_libraries, user_errors

if TYPE_CHECKING:
    from rich.progress import Progress

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")

_HELP = """Train a small Stable Diffusion from nothing: autoencoder, CLIP towers, denoiser.

[bold]key=value[/] overrides the YAML; configs/base_model.py (BaseConfig) lists every setting.
Ctrl-C writes a checkpoint and stops. The same command again continues, to the same bits.

[bold]Examples[/]

  python -m train.base_model run -c configs/base/cpu.yaml data=OUT/dataset output=OUT
  … rounds=2                   trains the denoiser for as long again
  torchrun --nproc-per-node 4 -m train.base_model run -c configs/base/gpu.yaml …

[bold]Output[/] folder: base/ (for StableDiffusionPipeline.from_pretrained), index.html.
"""


@app.callback()
def main() -> None:
    """A small base model."""


@app.command(help=_HELP)
def run(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", "-c", metavar="FILE", help="A YAML preset.")
    ] = None,
) -> None:
    with user_errors():
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        from configs.base_model import BaseConfig
        from configs.load import load
        from train.processes import is_first_process

        settings = load(BaseConfig, config, overrides or ())
        quiet_libraries()
        from train.base_model.run import train_base

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        is_first = is_first_process()
        with Progress(*columns, disable=not is_first or not sys.stderr.isatty()) as progress:
            signal = train_base(settings, _Watcher(progress, quiet=not is_first))
        if signal:
            typer.echo("stopped; the same command continues.", err=True)
            raise typer.Exit(128 + signal)
        if is_first:
            typer.echo(f"base in {settings.output}/base; see {settings.output}/index.html")


class _Watcher:
    """A progress bar for each part; without a terminal, a line every ten seconds."""

    def __init__(self, progress: Progress, *, quiet: bool) -> None:
        self._progress, self._quiet = progress, quiet
        self._name, self._total, self._batch, self._first = "", 0, 0, 0
        self._started = self._last_line = time.monotonic()
        self._task = progress.add_task("", total=1, rate="", losses="", visible=False)

    def message(self, text: str) -> None:
        if not self._quiet:
            typer.echo(text, err=True)

    def start(self, name: str, step: int, total: int, batch_size: int) -> None:
        self._name, self._first, self._total, self._batch = name, step, total, batch_size
        self._started = self._last_line = time.monotonic()
        self._progress.reset(
            self._task, description=name, total=total, completed=step, visible=True
        )

    def step(self, step: int, losses: dict[str, float] | None) -> None:
        now = time.monotonic()
        rate = (step - self._first) / max(now - self._started, 1e-9)
        speed = f"{rate * self._batch:.1f} samples/s"
        self._progress.update(self._task, completed=step, rate=speed)
        if losses is None:
            return
        text = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
        self._progress.update(self._task, losses=text)
        if self._progress.disable and (now - self._last_line >= 10 or step == self._total):
            self._last_line = now
            self.message(
                f"{self._name}: step {step:,}/{self._total:,}  {text}  {speed}  "
                f"{(self._total - step) / rate:.0f} s left"
            )


if __name__ == "__main__":
    app()
