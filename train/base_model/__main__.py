"""`python -m train.base_model run`: trains a small base model on FGID shards."""

from __future__ import annotations

from typing import Annotated

import typer

from train.cli import quiet_libraries, user_errors

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
        from configs.base_model import BaseConfig
        from configs.load import load
        from train.processes import is_first_process

        settings = load(BaseConfig, config, overrides or ())
        quiet_libraries()
        from train.base_model.run import train_base
        from train.progress import TrainingProgress

        is_first = is_first_process()
        with TrainingProgress(quiet=not is_first) as progress:
            signal = train_base(settings, progress)
        if signal:
            typer.echo("stopped; the same command continues.", err=True)
            raise typer.Exit(128 + signal)
        if is_first:
            typer.echo(f"base in {settings.output}/base; see {settings.output}/index.html")


if __name__ == "__main__":
    app()
