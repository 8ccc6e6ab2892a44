"""Commands on a finished data set: status, info, lint, report, inspect, export-json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from configs.errors import PipelineError
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
        from pipelines.planning.plan import planned_shards

        store = open_store(output)
        ledger = read_ledger(store)
        typer.echo(f"{ledger.shards} of {planned_shards(store)} planned shards are committed")
        for line in ledger.lines():
            typer.echo(line)


@app.command()
def info(output: Output) -> None:
    """Print a data set's source, stages, signatures, weights and their licences."""
    with errors():
        try:
            typer.echo(open_store(output).read(layout.DATASET).decode(), nl=False)
        except FileNotFoundError:
            raise PipelineError(
                f"{output} is not a data set: it has no {layout.DATASET}. Make one with `run`."
            ) from None


@app.command()
def lint(output: Output) -> None:
    """Compare all files with their digests and all samples with their rows. Exits with 1 if there
    are faults.
    """
    with errors():
        from pipelines.ledger import read_ledger
        from pipelines.lint import lint as lint_dataset
        from pipelines.takedown import statements

        store = open_store(output)
        faults = 0
        for line in lint_dataset(store):
            typer.secho(line, fg="red")
            faults += 1
        typer.echo(f"{read_ledger(store).shards} shards checked, {faults or 'no'} faults")
        for line in () if faults else statements(store):
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
