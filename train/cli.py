"""`python -m train.cli`: train an adapter on FGID shards.

Large libraries are imported inside functions, so that --help answers at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from configs.training import TrainConfig

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Train a ConsistentID adapter on FGID shards, and ask what a run did.",
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

  Four workers of a Ray cluster; one that dies is started again:
    python -m train.cli run --config configs/train/sd15.yaml data=s3://bucket/fgid \\
        output=/mnt/runs/sd15 ray.address=10.0.0.1:6379 ray.workers=4

  Several data sets:                  … 'data=[{path: a}, {path: b}]'
  Continue a finished run:            … max_train_steps=20000
  … with another learning rate:       … optim.learning_rate=5e-5 accept_changes=optim.learning_rate
  Start from the published weights:   … adapter=ConsistentID-v1.bin model.mode=legacy
  … from IP-Adapter's FaceID-Plus:    … adapter=ip-adapter-faceid-plus_sd15.bin train.parts=paper
  What would it take?                 … --dry-run
  Show the losses:                    tensorboard --logdir runs/sd15/logs

[bold]Output[/] folder: final/ (the adapter, for `make infer`), checkpoint-NNNNNN/, config.yaml,
losses.jsonl, summary.json, logs/.

Exit status: 0 finished, 2 wrong settings, data or weights, 130 stopped by Ctrl-C, 143 by SIGTERM.
"""


@app.command(help=_RUN_HELP)
def run(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", metavar="FILE", help="A YAML preset, also at a URL."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Take two steps, and print memory, time and an estimate."),
    ] = False,
) -> None:
    with user_errors():
        _train(_configuration(config, overrides or ()), dry_run=dry_run)


_FEATURES_HELP = """Compute features of the frozen encoders, and store them beside the data set.

Training with the same settings then reads them, and doesn't run the encoders. The same command
again computes what is missing, after a kill or after the data set has changed.

[bold]Examples[/]

  Latents of Stable Diffusion's VAE, 65 KB a sample:
    python -m train.cli features --config configs/train/sd15.yaml data=runs/fgid

  The image encoder's states too, 3.9 MB a sample, on a Ray cluster's GPUs:
    python -m train.cli features --config configs/train/sd15.yaml data=s3://bucket/fgid \\
        features.kinds=[vae,image] features.executor=ray features.ray.address=auto \\
        features.placement.gpus=1 features.placement.batch_size=16

The features are stored in DATA/features. [bold]Settings[/]: FeaturesConfig in configs/training.py.

Exit status: 0 finished, 2 wrong settings, data or weights, 130 stopped by Ctrl-C.
"""


@app.command(help=_FEATURES_HELP)
def features(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", metavar="FILE", help="The preset of the training."),
    ] = None,
) -> None:
    with user_errors():
        settings = _configuration(config, overrides or ())
        quiet_libraries()
        from train.features.make import make_features
        from train.progress import TrainingProgress

        with TrainingProgress(quiet=False) as progress:
            make_features(settings, progress)


_OUTPUT = "The output of a run, a folder or URL."


@app.command(
    help="""Compute the losses of a step again, sample by sample, without changing anything.

The weights are those of the newest checkpoint before the step. If that is the step before, the loss
has the bits of the recorded one. The run may continue meanwhile.

[bold]Example[/]

  python -m train.cli replay runs/sd15 --step 12001 --images bad
"""
)
def replay(
    output: Annotated[str, typer.Argument(metavar="OUT", help=_OUTPUT)],
    step: Annotated[int, typer.Option("--step", min=1, help="Counted from 1.")],
    images: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Save the pictures that the step trained on."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    with user_errors():
        quiet_libraries()
        from train.replay import as_json as to_json
        from train.replay import replay as compute
        from train.replay import show

        losses = compute(output, step, images=images)
        typer.echo(to_json(losses)) if as_json else show(losses)


@app.command(
    help="""Write OUT/report/index.html again: losses, validation, speed, and bad samples.

A run writes it at each validation and at its end; this command also while it trains.

[bold]Example[/]

  python -m train.cli report runs/sd15
"""
)
def report(
    output: Annotated[str, typer.Argument(metavar="OUT", help="The output of a run, a folder.")],
) -> None:
    with user_errors():
        from configs.errors import ConfigError
        from train.report import write_report

        if "://" in output:
            raise ConfigError(
                f"{output}: expected a folder. A run whose output is a URL writes the report there "
                "at each validation and at its end."
            )
        typer.echo(write_report(Path(output)))


_SEEN_HELP = """List the steps that used samples, and the newest checkpoint that never saw them.

It works after the samples were removed from the data set: the run keeps what it trained on.

[bold]Examples[/]

  python -m train.cli seen runs/sd15 --key 0a1b2c3d4e5f60718293
  python -m train.cli seen runs/sd15 --takedown runs/dataset    every removal request so far
"""


@app.command(help=_SEEN_HELP)
def seen(
    output: Annotated[str, typer.Argument(metavar="OUT", help=_OUTPUT)],
    key: Annotated[
        list[str] | None, typer.Option("--key", metavar="KEY", help="Of a sample; repeatable.")
    ] = None,
    takedown: Annotated[
        str, typer.Option(metavar="DATASET", help="A data set: the keys of its removal log.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    with user_errors():
        from train.seen import as_json as to_json
        from train.seen import as_text
        from train.seen import seen as search

        answer = search(output, key or [], takedown)
        typer.echo(to_json(answer) if as_json else as_text(answer))


def _configuration(path: str | None, overrides: Sequence[str]) -> TrainConfig:
    """Returns the settings of a run. path: of a YAML file, also an fsspec URL."""
    from configs.load import load, load_text
    from configs.training import TrainConfig

    if path is None or "://" not in path:
        return load(TrainConfig, path, overrides)
    from configs.errors import ConfigError
    from stages.storage.store import Store

    folder, _, name = path.rpartition("/")
    try:
        text = Store(folder).read(name).decode()
    except FileNotFoundError:
        raise ConfigError(f"no configuration at {path}") from None
    return load_text(TrainConfig, text, overrides, name=path)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns an error that the user can repair into a line and exit status 2."""
    from configs.errors import PipelineError, user_message

    try:
        yield
    except (PipelineError, OSError) as error:
        if (message := user_message(error)) is None:
            raise
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(2) from None


def quiet_libraries() -> None:
    """Hides progress bars and warnings of libraries that don't concern the user."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers are forked
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("diffusers", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import diffusers
    import transformers

    for library in (diffusers, transformers):  # they show a progress bar for each file
        library.utils.logging.disable_progress_bar()


def _train(config: TrainConfig, *, dry_run: bool) -> None:
    from train.processes import check_launcher, is_first_process

    check_launcher()
    quiet_libraries()
    from train.progress import TrainingProgress
    from train.ray_train import train_on_ray
    from train.trainer import train

    with TrainingProgress(quiet=not is_first_process()) as progress:
        progress.start("training", 0, config.max_train_steps, config.global_batch_size)
        if dry_run:
            from train.dry_run import dry_run as estimate

            progress.message(str(estimate(config, progress)))
            return
        start = train_on_ray if config.ray.address else train
        outcome = start(config, progress)
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


if __name__ == "__main__":
    app()
