"""`python -m pipelines.cli`: photographs → FGID shards + report. Imports lazily: --help answers at
once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from configs.errors import PipelineError

if TYPE_CHECKING:
    from configs.schema import DatasetConfig
    from pipelines.report.stats import Report
    from pipelines.run import Job
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


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """A user's error is a message and exit 2; Ctrl-C says how to go on and exits 130."""
    try:
        yield
    except PipelineError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as stopped:
        typer.secho(
            "\nstopped; finished shards are kept. The same command goes on from there.",
            fg="yellow",
            err=True,
        )
        traceback.clear_frames(stopped.__traceback__)  # temporary files go with what held them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)  # a thread may be waiting for a server, and Python would wait for the thread


def _load(config: str, overrides: list[str] | None) -> DatasetConfig:
    from configs.load import load
    from configs.schema import DatasetConfig

    _log()
    return load(DatasetConfig, config or None, overrides or ())


def _log() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    quiet = (
        "httpx",
        "httpx2",
        "openai",
        "urllib3",
        "fsspec",
        "ray",
        "botocore",
        "aiobotocore",
        "s3fs",
        "faiss",
    )
    for noisy in quiet:
        logging.getLogger(noisy).setLevel(logging.WARNING)


@app.command()
def run(
    config: Config = "",
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run and why; write nothing.")
    ] = False,
) -> None:
    """Make the data set: resize, detect, parse, embed, caption, shards, report.

    Example: python -m pipelines.cli run --config configs/dataset/demo.yaml source.path=photos
    output=runs/mine
    """
    with _errors():
        settings = _load(config, overrides)
        _plan_and_run(settings, frozenset(), dry_run)


@app.command()
def retry(
    output: Output,
    reason: Annotated[
        list[str], typer.Option(help="A reason as `status` names it; may be given several times.")
    ],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run and why; write nothing.")
    ] = False,
) -> None:
    """Try again just those inputs that ended with --reason, with the configuration kept in OUT.

    Example: python -m pipelines.cli retry runs/mine --reason timeout --reason http_503
    """
    with _errors():
        from configs.load import load_text
        from configs.schema import DatasetConfig
        from pipelines.ledger import read_ledger

        store = _store(output)
        ledger = read_ledger(store)
        known = {*ledger.failed, *ledger.dropped}
        if unknown := [name for name in reason if name not in known]:
            raise PipelineError(
                f"no input of {output} ended with {', '.join(unknown)}. Reasons there are: "
                f"{', '.join(sorted(known)) or 'none'}."
            )
        _log()
        kept = store.read("config.yaml").decode()
        settings = load_text(DatasetConfig, kept, [f"output={output}", *(overrides or ())])
        _plan_and_run(settings, frozenset(reason), dry_run)


def _plan_and_run(settings: DatasetConfig, retry: frozenset[str], dry_run: bool) -> None:
    from pipelines.run import plan_job

    job = plan_job(settings, retry)
    typer.echo(
        f"plan: {job.plan.inputs:,} inputs in {len(job.plan.shards)} shards "
        f"({job.plan.new:,} new, {job.plan.changed:,} changed, {job.plan.vanished:,} vanished)"
    )
    for line in job.why() or ["nothing to do: every shard is committed with this configuration"]:
        typer.echo(f"  {line}")
    if not dry_run:
        _run(job)


def _run(job: Job) -> None:
    from pipelines.ledger import read_ledger
    from pipelines.progress import Progress
    from pipelines.report import images_per_second
    from pipelines.review import check_trainable
    from pipelines.run import execute, fetch_weights

    for weight in fetch_weights(job.config):
        typer.echo(f"  weights {weight['file']}: {weight['license']}")
    started, manifests = time.time(), []
    with Progress(job.pending_inputs) as progress:
        for manifest in execute(job, progress.advance):
            manifests.append(manifest)
            progress.note(manifest)
    ledger = read_ledger(job.store)
    for line in ledger.lines():
        typer.echo(line)
    report = _write_report(job.store)
    if manifests:
        rate = images_per_second(manifests) or 0.0
        typer.echo(
            f"{job.pending_inputs:,} images in {time.time() - started:.1f} s; {rate:.2f} images/s once "
            "models were loaded"
        )
    typer.echo(f"shards: {job.store.url}/shards\nreport: {job.store.url}/report/index.html")
    check_trainable(report, job.config.review.max_untrainable)


def _write_report(store: Store) -> Report:
    from pipelines.report import write_report
    from pipelines.report.card.readme import write_card

    report = write_report(store)
    write_card(store, report)
    return report


@app.command()
def status(output: Output) -> None:
    """How far a data set is: shards committed, and the ledger."""
    with _errors():
        from pipelines.ledger import read_ledger
        from pipelines.planning.plan import planned_shards

        store = _store(output)
        ledger = read_ledger(store)
        typer.echo(f"{ledger.shards} of {planned_shards(store)} planned shards are committed")
        for line in ledger.lines():
            typer.echo(line)


@app.command()
def info(output: Output) -> None:
    """What a data set is made of: source, stages, signatures, weights and their licences."""
    with _errors():
        try:
            typer.echo(_store(output).read("dataset.json").decode(), nl=False)
        except FileNotFoundError:
            raise PipelineError(
                f"{output} is no data set: it has no dataset.json. Make one with `run`."
            ) from None


@app.command()
def lint(output: Output) -> None:
    """Check every file against its digest and every sample against its row; exits 1 if anything is
    off.
    """
    with _errors():
        from pipelines.ledger import read_ledger
        from pipelines.lint import lint as find

        store = _store(output)
        found = 0
        for line in find(store):
            typer.secho(line, fg="red")
            found += 1
        typer.echo(f"{read_ledger(store).shards} shards checked, {found or 'no'} faults")
        if found:
            raise typer.Exit(1)


@app.command()
def takedown(
    output: Output,
    source: Annotated[
        str, typer.Option(help="A picture's name in its source; * and ? stand for anything.")
    ] = "",
    hash_: Annotated[
        str, typer.Option("--hash", help="sha256 of a picture's file, or such a file.")
    ] = "",
    photo: Annotated[
        Path | None, typer.Option(help="A photograph of the person, who is found by the face.")
    ] = None,
    similarity: Annotated[
        float,
        typer.Option(
            help="With --photo: cosine from which a face is the person's; 0: identity_similarity."
        ),
    ] = 0.0,
    note: Annotated[
        str, typer.Option(help="For the log, such as a ticket's number; nothing personal.")
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go; change nothing.")
    ] = False,
) -> None:
    """Remove pictures, or all of a person, for good; only the shards that hold them are written
    again.

    Example: python -m pipelines.cli takedown runs/mine --photo ada.jpg --dry-run
    """
    with _errors():
        from configs.load import load_text
        from configs.schema import DatasetConfig
        from pipelines import takedown as removal

        _log()
        given = {"source": source, "hash": hash_, "photo": str(photo or "")}
        chosen = [name for name, value in given.items() if value]
        if len(chosen) != 1:
            raise PipelineError(
                f"give one of --source, --hash and --photo; given: {', '.join(chosen) or 'none'}."
            )
        store = _store(output)
        config = load_text(DatasetConfig, store.read("config.yaml").decode(), [f"output={output}"])
        if photo is not None:
            found = removal.by_photo(
                store, config, photo, similarity or config.global_pass.identity_similarity
            )
        else:
            found = (
                removal.by_hash(store, removal.digest_of(hash_))
                if hash_
                else removal.by_source(store, source)
            )
        for match in sorted(found, key=lambda match: (match.shard, match.source)):
            typer.echo(
                f"  fgid-{match.shard:06d}  {match.key}  {_printable(match.source)}  ({match.why})"
            )
        shards = len({match.shard for match in found})
        typer.echo(f"{len(found)} inputs in {shards} shards{' would go' if dry_run else ''}")
        if dry_run or not found:
            return
        if not yes:
            typer.confirm("remove them for good?", abort=True)
        names = removal.take_down(store, config, found, cast(removal.By, chosen[0]), note)
        _write_report(store)
        typer.echo(
            f"removed; {len(names)} shards written again, logged in {store.url}/takedown.jsonl"
        )
        typer.echo(
            "Delete the files from the source too, and copies of old shards; adapters trained on "
            "them remember."
        )


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


@app.command()
def report(output: Output) -> None:
    """Write OUT/report/index.html and stats.json, README.md and croissant.json again from the
    shards.
    """
    with _errors():
        store = _store(output)
        _write_report(store)
        typer.echo(f"report: {store.url}/report/index.html")


@app.command()
def inspect(
    output: Output,
    key: Annotated[
        str,
        typer.Argument(help="A key, at least four digits of its beginning, or a picture's name."),
    ],
    png: Annotated[
        Path | None, typer.Option("--png", help="Write picture, labels and legend there.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the --png file.")] = False,
    no_picture: Annotated[bool, typer.Option("--no-picture", help="Text only.")] = False,
) -> None:
    """Show one input: its picture, labels and faces, why it ended as it did, and what the trainer
    makes of it.

    Example: python -m pipelines.cli inspect runs/mine 0c0f
    """
    with _errors():
        from pipelines.inspect.find import inspect as look
        from pipelines.inspect.panes import write_sheet
        from pipelines.inspect.tables import console_of, show

        found = look(_store(output), key)
        if png is not None:
            write_sheet(found, png, overwrite)
        show(found, console_of(), not no_picture)
        if png is not None:
            typer.echo(f"written: {png}")


@app.command("export-json")
def export_json(
    output: Output,
    folder: Annotated[Path, typer.Argument(help="Where the layout goes.")],
    color: Annotated[
        bool, typer.Option("--color", help="Also each parsing in colours over its picture.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write into a folder that isn't empty.")
    ] = False,
) -> None:
    """Write the layout that FGID is published in, JSON_all.json and its folders; source.kind=fgid
    reads it back.

    Example: python -m pipelines.cli export-json runs/mine fgid
    """
    with _errors():
        from pipelines.export_fgid import export_json as export
        from pipelines.ledger import read_ledger
        from pipelines.progress import Progress

        store = _store(output)
        with Progress(read_ledger(store).written) as progress:
            count = export(
                store, folder, color=color, overwrite=overwrite, advance=progress.advance
            )
        typer.echo(f"{count:,} pictures in {folder}/JSON_all.json")


@app.command()
def weights(config: Config = "", overrides: Overrides = None) -> None:
    """Fetch and check the weights of a configuration ahead of a run."""
    with _errors():
        from pipelines.run import fetch_weights

        for weight in fetch_weights(_load(config, overrides)):
            typer.echo(f"{weight['file']}  sha256 {weight['sha256']}  {weight['license']}")


@app.command()
def synthesize(
    folder: Annotated[Path, typer.Argument(help="Where the pictures go.")],
    count: Annotated[int, typer.Option(min=1, help="How many portraits.")] = 64,
    seed: Annotated[
        int, typer.Option(min=0, help="Portrait i depends on the seed and i alone.")
    ] = 0,
    poison: Annotated[
        bool, typer.Option(help="Also every kind of bad file, under poisoned/, and a photograph.")
    ] = False,
) -> None:
    """Make photo-real portraits of nobody (MobileStyleGAN, FFHQ): input for the demo and for tests."""
    with _errors():
        from rich.progress import track

        from pipelines.demo.synthesize import write_extras, write_portraits

        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        for _ in track(write_portraits(folder, count, seed), description="portraits", total=count):
            pass
        if poison:
            write_extras(folder, seed)
        typer.echo(f"{count} portraits in {folder}")


def _store(output: str) -> Store:
    from stages.storage.store import Store

    store = Store(output)
    if not store.names("shards"):
        raise PipelineError(
            f"{output} holds no shards. Make some with `run`, or give the right folder."
        )
    return store


if __name__ == "__main__":
    app()
