"""Commands that make a data set: run, retry, weights, synthesize."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.errors import PipelineError, QualityError, ShardError
from pipelines.cli.common import (
    Config,
    Output,
    Overrides,
    app,
    errors,
    load_config,
    note_uncommitted,
    open_store,
    stored_config,
    write_reports,
)

if TYPE_CHECKING:
    from configs.schema import DatasetConfig
    from pipelines.run import Job

Preview = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print what would be done and why, and captions of three pictures; change nothing.",
    ),
]


@app.command()
def run(
    config: Config = "",
    overrides: Overrides = None,
    dry_run: Preview = False,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Read all files first, and make damaged ones again."),
    ] = False,
) -> None:
    """Make a data set: resize, detect, parse, embed and caption images; write shards and a report.

    Example: python -m pipelines.cli run -c configs/dataset/demo.yaml source.path=photos output=OUT
    """
    with errors():
        settings = load_config(config, overrides)
        _plan_and_run(settings, frozenset(), dry_run, repair)


@app.command()
def retry(
    output: Output,
    reason: Annotated[
        list[str], typer.Option(help="A reason that `status` shows; may be given several times.")
    ],
    overrides: Overrides = None,
    dry_run: Preview = False,
) -> None:
    """Process inputs again that were dropped or failed with --reason, with OUT's configuration.

    Example: python -m pipelines.cli retry runs/mine --reason timeout --reason http_503
    """
    with errors():
        from pipelines.ledger import read_ledger

        store = open_store(output)
        ledger = read_ledger(store)
        reasons = {*ledger.failed, *ledger.dropped}
        if unknown := [name for name in reason if name not in reasons]:
            raise PipelineError(
                f"no input of {output} was dropped or failed with {', '.join(unknown)}. Reasons: "
                f"{', '.join(sorted(reasons)) or 'none'}."
            )
        settings = stored_config(store, overrides)
        _plan_and_run(settings, frozenset(reason), dry_run)


def _plan_and_run(
    settings: DatasetConfig, retry: frozenset[str], dry_run: bool, repair: bool = False
) -> None:
    """Prints the plan and, unless dry_run, executes it."""
    from pipelines.run import plan_job
    from stages.storage.reader import DatasetReader

    job = _plan_repair(settings) if repair else plan_job(settings, retry)
    typer.echo(
        f"plan: {job.plan.inputs:,} inputs in {len(job.plan.shards)} shards "
        f"({job.plan.new:,} new, {job.plan.changed:,} changed, {job.plan.vanished:,} vanished)"
    )
    for line in job.plan.passed_over.lines(settings.source.extensions):
        typer.echo(f"  {line}")
    for line in job.why() or [_without_shards(job)]:
        typer.echo(f"  {line}")
    if not retry:  # retry has printed it
        note_uncommitted(job.store)
    before = settings.shard_size
    with suppress(ShardError):  # this run replaces a damaged config.yaml
        before = DatasetReader(job.store).config_values().get("shard_size", before)
    if before != settings.shard_size:
        typer.echo(
            f"  shard_size was {before}; {settings.shard_size} holds for new shards only. For one "
            "size, make the data set in another output."
        )
    if dry_run:
        _preview(job)
    else:
        _run(job)


def _preview(job: Job) -> None:
    """Captions some of the pictures of a planned run, and prints the captions."""
    from pipelines.preview import preview

    if result := preview(job):
        typer.echo("captions of the first pictures, which aren't kept:")
        for line in result.lines():
            typer.echo(line)


def _plan_repair(settings: DatasetConfig) -> Job:
    """Reads all files of the output, with progress, and prints which are damaged. Returns the run
    that makes them again.
    """
    from pipelines.lint import lint_total
    from pipelines.progress import Progress
    from pipelines.run import plan_job
    from stages.storage.store import Store

    with Progress(lint_total(Store(settings.output), fast=False), "bytes") as progress:
        job = plan_job(settings, repair=True, advance=progress.advance)
    for each in job.damage:
        typer.echo(f"damaged: {each.name}: {each.how}")
    if not job.damage:
        typer.echo("no file is damaged")
    return job


def _without_shards(job: Job) -> str:
    """Returns what a run without pending shards does."""
    from pipelines.run import is_current

    if is_current(job):
        return "nothing to do: every shard is committed with this configuration"
    return (
        "no shard: only the global pass, and files such as plan and configuration that are missing "
        "or outdated"
    )


def _run(job: Job) -> None:
    """Executes a planned run, prints the ledger, and writes the reports."""
    from pipelines.ledger import read_ledger
    from pipelines.progress import Progress
    from pipelines.report import images_per_second
    from pipelines.review import check_trainable
    from pipelines.run import execute, fetch_weights

    for weight in fetch_weights(job.config, job.chain):
        typer.echo(f"  weights {weight['file']}: {weight['license']}")
    started, manifests = time.time(), []
    with Progress(job.pending_inputs) as progress:
        for manifest in execute(job, progress.advance):
            manifests.append(manifest)
            progress.note(manifest)
    ledger = read_ledger(job.store)
    for line in ledger.lines():
        typer.echo(line)
    report = write_reports(job.store)
    if manifests:
        rate = images_per_second(manifests) or 0.0
        typer.echo(
            f"{job.pending_inputs:,} images in {time.time() - started:.1f} s; {rate:.2f} images/s "
            "after models were loaded"
        )
    typer.echo(f"shards: {job.store.url}/shards\nreport: {job.store.url}/report/index.html")
    if not ledger.written:
        reasons = (ledger.dropped + ledger.failed).most_common()
        raise QualityError(
            f"none of {ledger.inputs:,} inputs became a sample: "
            f"{', '.join(f'{reason} {count}' for reason, count in reasons)}. The report says for "
            "each reason what to do."
        )
    _report_repair(job)
    check_trainable(report, job.config.review.max_untrainable)


def _report_repair(job: Job) -> None:
    """Prints what a repair could not make again; if that is anything, exits with 1."""
    lost = job.lost()
    for loss in lost:
        typer.secho(f"not repaired: {loss.source!r}: {loss.why}", fg="red")
    if lost:
        typer.echo(
            f"{len(lost):,} samples could not be made again, since their inputs can't be read. "
            "Restore the inputs, or the shards from a copy, and run the same command again."
        )
        raise typer.Exit(1)
    if job.damage:
        typer.echo(f"repaired: {len(job.damage)} files")


@app.command()
def weights(config: Config = "", overrides: Overrides = None) -> None:
    """Fetch and check the weights of a configuration before a run."""
    with errors():
        from pipelines.run import fetch_weights

        for weight in fetch_weights(load_config(config, overrides)):
            typer.echo(f"{weight['file']}  sha256 {weight['sha256']}  {weight['license']}")


@app.command()
def synthesize(
    folder: Annotated[Path, typer.Argument(help="The folder for the images.")],
    count: Annotated[int, typer.Option(min=1, help="Number of portraits.")] = 64,
    people: Annotated[
        int,
        typer.Option(
            min=0,
            help="Number of people with several pictures each, in place of --count portraits.",
        ),
    ] = 0,
    pictures: Annotated[int, typer.Option(min=1, help="Of each of the --people.")] = 2,
    side: Annotated[
        int, typer.Option(min=32, max=1024, help="Of the --people's pictures, in pixels.")
    ] = 256,
    seed: Annotated[
        int, typer.Option(min=0, help="Portrait or person i depends only on the seed and i.")
    ] = 0,
    poison: Annotated[
        bool,
        typer.Option(help="Also write all kinds of bad files to _poisoned/, and a photograph."),
    ] = False,
) -> None:
    """Make synthetic portraits (MobileStyleGAN, FFHQ), for the demo, tests and `make base`.

    With --people, each person has a folder of pictures that differ in pose, expression, light, hair
    colour and glasses.
    """
    with errors():
        from pipelines.demo.families import write_families
        from pipelines.demo.synthesize import write_extras, write_portraits
        from pipelines.progress import Progress

        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        if people:
            written = write_families(folder, people=people, pictures=pictures, seed=seed, side=side)
            with Progress(people, "people") as progress:
                total = sum(progress.advanced(written))
            contents = f"{total} pictures of {people} people"
        else:
            portraits = write_portraits(folder, count, seed)
            with Progress(count, "portraits") as progress:
                total = sum(1 for _ in progress.advanced(portraits))
            contents = f"{total} portraits"
        if poison:
            write_extras(folder, seed)
        typer.echo(f"{contents} in {folder}")
