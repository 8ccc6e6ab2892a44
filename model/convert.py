"""`python -m model.convert`: an adapter from one form into another.

Large libraries are imported inside functions, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.errors import ConfigError, PipelineError, user_message

if TYPE_CHECKING:
    from model.checkpoint import AdapterFile

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Form(StrEnum):
    """A form of an adapter that can be written."""

    AUTO = "auto"
    ADAPTER = "adapter"
    PUBLISHED = "published"
    IP_ADAPTER = "ip-adapter"


class Precision(StrEnum):
    """The type of the written weights."""

    SAME = "same"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


_SUFFIXES = {Form.PUBLISHED: (".bin",), Form.IP_ADAPTER: (".bin", ".safetensors")}

Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="A published .bin, an adapter folder, or a training state that accelerate saved "
        "(its folder or file).",
    ),
]
Target = Annotated[
    Path, typer.Argument(metavar="TARGET", help="The file or folder to write, e.g. mine.bin.")
]
To = Annotated[
    Form,
    typer.Option(help="The form to write. auto: published for a TARGET in .bin, else adapter."),
]
Dtype = Annotated[Precision, typer.Option(help="The type of the written weights.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a TARGET that exists.")]


@app.command()
def main(
    source: Source,
    target: Target,
    to: To = Form.AUTO,
    dtype: Dtype = Precision.SAME,
    overwrite: Overwrite = False,
) -> None:
    """Convert an adapter into another form. Every weight is kept bit for bit, unless --dtype
    changes its type.

    **Published weights into an adapter folder**

    `python -m model.convert ConsistentID-v1.bin runs/v1`

    **A trained adapter into a published `.bin`, in half precision**

    `python -m model.convert runs/mine/final mine.bin --dtype float16`

    **A state that accelerate saved while training, with the whole UNet**

    `python -m model.convert checkpoint-5000 runs/old`

    **ID projector, ID attention and LoRA for programs that read IP-Adapter FaceID-Plus**

    `python -m model.convert ConsistentID-v1.bin faceid.safetensors --to ip-adapter`

    | form | content |
    | --- | --- |
    | `adapter` | a folder: `adapter.safetensors`, `adapter.json` |
    | `published` | `.bin`: `FacialEncoder`, `image_proj` or `image_proj_model`, `adapter_modules` |
    | `ip-adapter` | `.bin`, `.safetensors`: `image_proj`, `ip_adapter`; no facial encoder |

    Only tensors are read from `.bin` files, never code. A key that is missing, unknown or of
    another shape is an error, which names the first. TARGET appears when it is complete.

    Exit status: 0 if TARGET was written, 2 for a wrong SOURCE or TARGET.
    """
    with _errors():
        form = form_of(target, to)
        adapter = convert(
            source.expanduser(), target.expanduser().resolve(), form, dtype, overwrite
        )
        for note in notes(adapter, form):
            typer.secho(f"note: {note}", fg="yellow", err=True)
        typer.echo(
            f"{target}: form {form}, model {adapter.spec.name}, mode {adapter.mode}, "
            f"{len(adapter.state):,} tensors, "
            f"{sum(value.nbytes for value in adapter.state.values()) / 1e6:,.1f} MB"
        )


def convert(
    source: Path,
    target: Path,
    form: Form,
    dtype: Precision = Precision.SAME,
    overwrite: bool = False,
) -> AdapterFile:
    """Writes the adapter in `source` to `target`, and returns it as written.

    form: not auto. Raises ConfigError for a target that exists or doesn't suit the form,
    WeightsError for a source that is no adapter.
    """
    import torch

    from model import forms

    forms.check_target(target, folder=form is Form.ADAPTER, overwrite=overwrite)
    adapter = forms.read_any(source)
    if form is Form.IP_ADAPTER:
        adapter = forms.faceid_plus(adapter)
    adapter = forms.cast(adapter, None if dtype is Precision.SAME else getattr(torch, dtype))
    write = {
        Form.ADAPTER: forms.write_folder,
        Form.PUBLISHED: forms.write_published,
        Form.IP_ADAPTER: forms.write_ip_adapter,
    }[form]
    target.parent.mkdir(parents=True, exist_ok=True)
    write(adapter, target)
    return adapter


def form_of(target: Path, to: Form) -> Form:
    """Returns the form to write. Raises ConfigError for a target whose suffix doesn't suit it."""
    suffix = target.suffix.lower()
    form = to
    if to is Form.AUTO:
        form = Form.PUBLISHED if suffix == ".bin" else Form.ADAPTER
    suffixes = _SUFFIXES.get(form, ())
    if suffixes and suffix not in suffixes:
        raise ConfigError(
            f"TARGET {target} is for form {form}, which is a file in {' or '.join(suffixes)}; name "
            "such a file, or pass another --to."
        )
    if form is Form.ADAPTER and suffix in (".bin", ".safetensors", ".pt", ".pth", ".ckpt"):
        raise ConfigError(
            f"TARGET {target} looks like a file, but form adapter is a folder; name a folder, or "
            "pass --to published or --to ip-adapter."
        )
    return form


def notes(adapter: AdapterFile, form: Form) -> Iterator[str]:
    """Yields what the written form doesn't hold."""
    from model.spec import PUBLISHED_EMBEDDER

    if form is Form.IP_ADAPTER:
        yield "the facial encoder is left out, so facial regions have no effect with this file"
        if adapter.spec.shortcut:
            yield "it is of the v2 kind: set the projection's `shortcut` to True after loading"
    if form is Form.PUBLISHED:
        if adapter.mode != "legacy":
            yield f"a .bin doesn't hold the mode, {adapter.mode}; it is read as legacy"
        if adapter.embedder is not None and adapter.embedder != PUBLISHED_EMBEDDER:
            yield (
                f"a .bin doesn't hold the face embedder, {adapter.embedder.name}; it is read as "
                f"{PUBLISHED_EMBEDDER.name}"
            )


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Turns an error that the user can correct into a message and exit status 2."""
    try:
        yield
    except (PipelineError, OSError) as error:
        if (message := user_message(error)) is None:
            raise
        typer.secho(f"error: {message}", fg="red", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
