"""`python -m infer.cli`: make portraits from a photograph and prompts.

Large libraries are imported inside functions, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from configs.errors import ConfigError, PipelineError, user_message

if TYPE_CHECKING:
    from configs.portraits import InferConfig
    from infer.identity import Identity
    from infer.mixin import ConsistentIDMixin
    from infer.portrait import Portrait

SETTINGS_FILE: Final = "infer.yaml"
IDENTITY_FILE: Final = "identity.safetensors"
SHEET_FILE: Final = "contact_sheet.png"

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[
    str, typer.Option("--config", "-c", help="A preset, e.g. configs/infer/demo.yaml.")
]
Photo = Annotated[
    str, typer.Option("--photo", "-p", help="The photograph: one face, from the front.")
]
IdentityFile = Annotated[
    str,
    typer.Option(
        "--identity", "-i", help="In place of a photograph: identity.safetensors of an earlier run."
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-t", help="What to show. Repeat it for several prompts."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="e.g. adapter=runs/mine/final output=runs/portraits seed=7"
    ),
]


@app.command()
def main(
    config: Config = "",
    photo: Photo = "",
    identity: IdentityFile = "",
    prompt: Prompts = None,
    overrides: Overrides = None,
) -> None:
    """Make portraits of the person in a photograph.

    Writes `portrait-PROMPT-IMAGE.png` with all settings in their metadata, `contact_sheet.png`, the
    person as `identity.safetensors`, and the resolved configuration as `infer.yaml`, from which the
    same portraits can be made again.

    **Two prompts, four images each**

    `python -m infer.cli --config configs/infer/sd15.yaml adapter=ConsistentID-v1.bin --photo
    ada.jpg --prompt "a woman in a red coat" --prompt "a woman reading" output=runs/ada
    num_images_per_prompt=4`

    **The same person from the saved identity; another scheduler**

    `python -m infer.cli --config configs/infer/sd15.yaml adapter=ConsistentID-v1.bin
    --identity runs/ada/identity.safetensors --prompt "a woman at sea" output=runs/sea
    scheduler=DPMSolverMultistepScheduler num_inference_steps=25 start_merge_step=15`

    **Weaker conditioning on the eyes, stronger on the whole identity**

    `… region_strength.eyes=0.5 id_scale=1.2`

    **The same portraits again**

    `python -m infer.cli --config runs/ada/infer.yaml`

    Exit status: 0 if every portrait was written, 2 for wrong settings, photograph or weights.
    """
    with user_errors():
        _run(_settings(config, photo, identity, prompt, overrides))


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns an error that the user can correct into a message and exit status 2, Ctrl-C into exit
    status 130.
    """
    try:
        yield
    except (PipelineError, OSError) as error:
        if (message := user_message(error)) is None:
            raise
        typer.secho(f"error: {message}", fg="red", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.secho("\nstopped; the portraits written so far are complete.", fg="yellow", err=True)
        raise typer.Exit(130) from None


def _settings(
    config: str, photo: str, identity: str, prompts: list[str] | None, overrides: list[str] | None
) -> InferConfig:
    """Resolves the configuration: the preset, overridden by KEY=VALUE, overridden by the options.

    Raises ConfigError without a person, a prompt or an output.
    """
    from configs.load import load
    from configs.portraits import InferConfig

    settings = load(InferConfig, config or None, overrides or ())
    if photo and identity:
        raise ConfigError("both --photo and --identity were passed; give one of them.")
    if photo or identity:
        settings = replace(settings, photo=photo, identity=identity)
    if prompts:
        settings = replace(settings, prompts=tuple(prompts))
    if not (settings.photo or settings.identity):
        raise ConfigError(
            "no person given. Pass --photo FILE, or --identity FILE from an earlier run."
        )
    if not settings.prompts or not all(prompt.strip() for prompt in settings.prompts):
        raise ConfigError(
            'no prompt given, or an empty one. Pass --prompt "a man in a suit"; repeat it for '
            "several prompts."
        )
    if not settings.output:
        raise ConfigError("output is empty. Set output=FOLDER.")
    return settings


def _run(settings: InferConfig) -> None:
    quieten_libraries()
    from infer.schedulers import check_scheduler

    check_scheduler(settings.scheduler)
    folder = Path(settings.output).expanduser()
    _check_output(folder, settings)
    started = time.perf_counter()
    person, pipe = _load(settings)
    loaded = time.perf_counter()
    spec = pipe.adapter.model.spec.name
    typer.echo(f"{person.record.source}: {', '.join(person.regions)}; model {spec}", err=True)
    if spec == "tiny":
        typer.echo(
            "the tiny model is for tests: its weights are random, and so are portraits",
            err=True,
        )
    _prepare_output(folder, settings)
    person.save(folder / IDENTITY_FILE)
    paths = _write_portraits(folder, person, pipe, settings)
    ended = time.perf_counter()
    typer.echo(
        f"{len(paths)} portraits in {ended - loaded:.1f} s, after {loaded - started:.1f} s of "
        "loading:"
    )
    for path in paths:
        typer.echo(f"  {path}")
    typer.echo(f"contact sheet: {folder / SHEET_FILE}")


def _load(settings: InferConfig) -> tuple[Identity, ConsistentIDMixin]:
    """Loads the person and the pipeline.

    The face stages run first, so that a photograph without a face fails before gigabytes of other
    models are loaded.
    """
    from infer.adapter import reading_config
    from infer.identity import Identity
    from infer.load import configured_adapter, load_pipeline
    from infer.photo import PhotoReader
    from model.checkpoint import read_adapter
    from stages.backends.runtime import pin_threads

    if settings.identity:
        person = Identity.load(Path(settings.identity).expanduser())
        return person, load_pipeline(settings)
    source = configured_adapter(settings)
    adapter = read_adapter(source)
    dataset = reading_config(source, adapter, settings.dataset)
    pin_threads(dataset.threads or _allowed_threads())
    photo = Path(settings.photo).expanduser()
    reader = PhotoReader(dataset, adapter.spec, adapter.mode)
    record = reader.read(photo, settings.photo, settings.face)
    pipe = load_pipeline(settings)
    person = pipe.encode_identity(record)
    pipe.image_encoder = None  # it has no further use, and takes as much memory as the UNet
    return person, pipe


def _allowed_threads() -> int:
    """Returns OMP_NUM_THREADS, or 0 for all cores if it isn't set."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdecimal() else 0


def _write_portraits(
    folder: Path, person: Identity, pipe: ConsistentIDMixin, settings: InferConfig
) -> list[Path]:
    """Writes the portraits, then the contact sheet; returns the portraits' paths."""
    from infer.generate import evaluations, generate
    from infer.sheet import contact_sheet

    portraits: list[Portrait] = []
    paths: list[Path] = []
    count = len(settings.prompts) * settings.num_images_per_prompt
    with _progress(count * evaluations(pipe, settings)) as advance:
        for portrait in generate(pipe, person, settings, advance):
            paths.append(portrait.save(folder))
            portraits.append(portrait)
    contact_sheet(person, portraits).save(folder / SHEET_FILE)
    return paths


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar on a terminal; yields a function that advances it.

    total: number of the UNet's evaluations, over all portraits.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns: list[Any] = [
        TextColumn("denoising"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("denoising", total=total)
        yield lambda count: bar.advance(task, count)


def _resolved(settings: InferConfig) -> str:
    """Returns the contents of infer.yaml."""
    from configs.load import to_yaml

    return to_yaml(replace(settings, overwrite=False))


def _check_output(folder: Path, settings: InferConfig) -> None:
    """Raises ConfigError if `folder` is a file or holds portraits of another configuration."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output={folder} is a file; expected a folder. Name another output.")
    earlier = folder / SETTINGS_FILE
    if (
        earlier.is_file()
        and not settings.overwrite
        and earlier.read_text(encoding="utf-8") != _resolved(settings)
    ):
        raise ConfigError(
            f"output={folder} holds portraits of another configuration ({SETTINGS_FILE}). "
            "Name another output, or set overwrite=true to replace them."
        )


def _prepare_output(folder: Path, settings: InferConfig) -> None:
    """Makes the folder, removes the portraits that are to be overwritten, and writes infer.yaml."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if settings.overwrite:
            for portrait in folder.glob("portrait-[0-9]*-[0-9]*.png"):
                portrait.unlink()
        (folder / SETTINGS_FILE).write_text(_resolved(settings), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"output={folder} can't be written: {error.strerror or error}. Check its permissions, "
            "or name another output."
        ) from error


def quieten_libraries() -> None:
    """Silences the libraries' messages and progress bars while they load models."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "urllib3", "diffusers", "transformers", "onnxruntime", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    app()
