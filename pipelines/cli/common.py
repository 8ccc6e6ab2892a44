"""What the commands share: the application, its options, errors and logging."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Final

import typer

from configs.errors import PipelineError

if TYPE_CHECKING:
    from configs.schema import DatasetConfig
    from pipelines.report.stats import Report
    from stages.storage.store import Store

app = typer.Typer(
    help="Photographs → FGID shards with stats and a report. The same command again resumes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[
    str, typer.Option("--config", "-c", help="A preset, e.g. configs/dataset/demo.yaml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="e.g. source.path=photos output=runs/mine detect.min_score=0.6",
    ),
]
Output = Annotated[
    str, typer.Argument(metavar="OUT", help="The output of `run`: a folder or fsspec URL.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done and why; change nothing.")
]

_QUIET: Final = (
    *("httpx", "httpx2", "openai", "urllib3", "fsspec", "ray", "botocore", "aiobotocore", "s3fs"),
    "faiss",
)


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Prints a user's error as one message, exit status 2; Ctrl-C says how to continue, 130."""
    try:
        yield
    except PipelineError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as stopped:
        typer.secho(
            "\nstopped; finished shards are kept. The same command continues from there.",
            fg="yellow",
            err=True,
        )
        traceback.clear_frames(stopped.__traceback__)  # deletes temporary files held by frames
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)  # a thread may be waiting for a server, and Python would wait for the thread


def log() -> None:
    """Progress and notices go to stderr, without those of libraries."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def load_config(config: str, overrides: list[str] | None) -> DatasetConfig:
    """The configuration of a preset and overrides."""
    from configs.load import load
    from configs.schema import DatasetConfig

    log()
    return load(DatasetConfig, config or None, overrides or ())


def stored_config(store: Store, overrides: list[str] | None = None) -> DatasetConfig:
    """The configuration that is kept in a data set, with overrides."""
    from configs.load import load_text
    from configs.schema import DatasetConfig
    from stages.storage.reader import DatasetReader

    log()
    text = DatasetReader(store).config_text()
    return load_text(DatasetConfig, text, [f"output={store.url}", *(overrides or ())])


def open_store(output: str) -> Store:
    """The store of a data set. Raises PipelineError where there is none."""
    from stages.storage import layout
    from stages.storage.store import Store

    store = Store(output)
    if not store.names(layout.SHARDS):
        raise PipelineError(
            f"{output} holds no shards. Make some with `run`, or give the right folder."
        )
    return store


def write_reports(store: Store) -> Report:
    """Writes report, statistics, data card and Croissant description."""
    from pipelines.report import write_report
    from pipelines.report.card.readme import write_card

    report = write_report(store)
    write_card(store, report)
    return report
