"""Commands on a finished data set: status, info, lint, report, inspect, export-json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from configs.errors import PipelineError, ShardError
from pipelines.cli.common import (
    Output,
    app,
    errors,
    open_store,
    write_reports,
)
from stages.storage import layout


@app.command()
def status(output: Output) -> None:
    """Print the number of committed shards, and the ledger."""
    with errors():
        from pipelines.ledger import read_ledger
        from pipelines.planning.plan import planned_inputs

        store = open_store(output)
        ledger = read_ledger(store)
        planned = planned_inputs(store)
        if planned is None:
            raise ShardError(
                f"{output}/{layout.PLAN} is missing. {layout.how_to_repair(layout.PLAN)}"
            )
        typer.echo(f"{ledger.shards} of {len(planned)} planned shards are committed")
        for line in ledger.lines():
            typer.echo(line)


@app.command()
def info(output: Output) -> None:
    """Print a data set's source, stages, signatures, weights and their licences."""
    with errors():
        from stages.storage.reader import DatasetReader

        store = open_store(output)
        try:
            text = store.read(layout.DATASET)
        except FileNotFoundError:
            raise PipelineError(
                f"{output} has no {layout.DATASET}. {layout.how_to_repair(layout.DATASET)}"
            ) from None
        DatasetReader(store).dataset_info()  # for its error
        typer.echo(text.decode(), nl=False)


@app.command()
def lint(
    output: Output,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="Compare names, sizes and manifests; read no tar, no sidecar."),
    ] = False,
) -> None:
    """Compare all files with their digests and all samples with their rows. Exits with 1 if there
    are faults.
    """
    with errors():
        from pipelines.lint import lint as lint_dataset
        from pipelines.lint import lint_total
        from pipelines.progress import Progress
        from pipelines.takedown import statements

        store = open_store(output)
        faults = 0
        with Progress(lint_total(store, fast), "shards" if fast else "bytes") as progress:
            for line in lint_dataset(store, fast=fast, advance=progress.advance):
                typer.secho(line, fg="red")
                faults += 1
        shards = lint_total(store, fast=True)
        typer.echo(f"{shards} shards checked, {faults or 'no'} faults")
        for line in () if faults or fast else statements(store):
            typer.echo(line)
        if faults:
            raise typer.Exit(1)


@app.command()
def report(output: Output) -> None:
    """Write report, statistics and data card again, from the shards."""
    with errors():
        store = open_store(output)
        write_reports(store)
        typer.echo(f"report: {store.url}/report/index.html")


@app.command()
def inspect(
    output: Output,
    key: Annotated[
        str,
        typer.Argument(help="A key, its first digits (at least four), or an image's name."),
    ],
    png: Annotated[
        Path | None,
        typer.Option("--png", help="Write image, label map and legend to this file."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the --png file.")] = False,
    no_image: Annotated[bool, typer.Option("--no-image", help="Text only.")] = False,
) -> None:
    """Show one input: image, label map, faces, metrics, reason, and its training text.

    Example: python -m pipelines.cli inspect runs/mine 0c0f
    """
    with errors():
        from pipelines.inspect.find import inspect as find_input
        from pipelines.inspect.panes import write_sheet
        from pipelines.inspect.tables import console_of, show

        inspection = find_input(open_store(output), key)
        if png is not None:
            write_sheet(inspection, png, overwrite)
        show(inspection, console_of(), not no_image)
        if png is not None:
            typer.echo(f"written: {png}")


@app.command("export-json")
def export_json(
    output: Output,
    folder: Annotated[Path, typer.Argument(help="The folder for the export.")],
    color: Annotated[
        bool, typer.Option("--color", help="Also write images with the label map over them.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write into a folder that isn't empty.")
    ] = False,
) -> None:
    """Export all samples in the layout that FGID is published in. source.kind=fgid reads it.

    Example: python -m pipelines.cli export-json runs/mine fgid
    """
    with errors():
        from pipelines.export_fgid import export_json as export
        from pipelines.ledger import read_ledger
        from pipelines.progress import Progress

        store = open_store(output)
        with Progress(read_ledger(store).written) as progress:
            count = export(
                store, folder, color=color, overwrite=overwrite, advance=progress.advance
            )
        typer.echo(f"{count:,} samples in {folder}/JSON_all.json")
