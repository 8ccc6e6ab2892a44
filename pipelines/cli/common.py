"""Parts that all commands use: the application, options, errors and logging."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Final

import typer

from configs.errors import PipelineError, ShardError, user_message

if TYPE_CHECKING:
    from configs.schema import DatasetConfig
    from pipelines.report.stats import Report
    from stages.storage.store import Store

app = typer.Typer(
    help="Makes FGID shards and a report from photographs. A stopped command continues when it is "
    "run again.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[
    str, typer.Option("--config", "-c", help="A preset, for example configs/dataset/demo.yaml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="For example source.path=photos output=runs/mine detect.min_score=0.6.",
    ),
]
Output = Annotated[
    str, typer.Argument(metavar="OUT", help="The output of `run`: a folder or fsspec URL.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be done and why; change nothing.")
]

# libraries of which only warnings are logged
_QUIET: Final = (
    *("httpx", "httpx2", "openai", "urllib3", "fsspec", "ray", "botocore", "aiobotocore", "s3fs"),
    "faiss",
)


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """A context that prints a PipelineError, or a file that the user can't use, as one message and
    exits with 2. After Ctrl-C, prints how to continue and exits with 130.
    """
    try:
        yield
    except (PipelineError, OSError) as error:
        if (message := user_message(error)) is None:
            raise
        typer.secho(f"error: {message}", fg="red", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as stopped:
        typer.secho(
            "\nstopped; finished shards are kept. The same command continues from there.",
            fg="yellow",
            err=True,
        )
        traceback.clear_frames(stopped.__traceback__)  # closes, so deletes, temporary files
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)  # sys.exit would wait for threads, which may wait for a server


def log() -> None:
    """Logs to stderr; of libraries only warnings."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def load_config(config: str, overrides: list[str] | None) -> DatasetConfig:
    """Returns the configuration of a preset with overrides."""
    from configs.load import load
    from configs.schema import DatasetConfig

    log()
    return load(DatasetConfig, config or None, overrides or ())


def stored_config(store: Store, overrides: list[str] | None = None) -> DatasetConfig:
    """Returns the configuration of a data set's last run, with overrides. Raises ShardError if it
    is missing or damaged.
    """
    from configs.load import load_text
    from configs.schema import DatasetConfig
    from stages.storage import layout
    from stages.storage.reader import DatasetReader

    log()
    reader = DatasetReader(store)
    if not reader.config_values():
        raise ShardError(
            f"{store.url}/{layout.CONFIG} is missing or empty. "
            f"{layout.how_to_repair(layout.CONFIG)}"
        )
    text = reader.config_text()
    return load_text(DatasetConfig, text, [f"output={store.url}", *(overrides or ())])


def open_store(output: str) -> Store:
    """Returns the store of a data set. Raises PipelineError if it has no shards. Prints a note if
    files of a shard have no manifest, since commands then read the other shards only.
    """
    from stages.storage import layout
    from stages.storage.store import Store

    store = Store(output)
    if not store.names(layout.SHARDS):
        raise PipelineError(
            f"{output} has no shards. Make some with `run`, or give the folder of a data set."
        )
    note_uncommitted(store)
    return store


def note_uncommitted(store: Store) -> None:
    """Prints a note if files of a shard have no manifest."""
    from stages.storage.reader import DatasetReader

    if shards := DatasetReader(store).uncommitted():
        more = f", and {len(shards) - 1} more" if len(shards) > 1 else ""
        typer.secho(
            f"note: {shards[0]} has files, but no manifest {shards[0]}.json{more}. Such a shard "
            "doesn't count; `run` makes it again.",
            fg="yellow",
            err=True,
        )


def write_reports(store: Store) -> Report:
    """Writes report, statistics and data card. Returns the report's numbers."""
    from pipelines.report import write_report
    from pipelines.report.card.readme import write_card

    report = write_report(store)
    write_card(store, report)
    return report
