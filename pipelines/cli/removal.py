"""Command `takedown`: removes images, or all images of a person, from a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from configs.errors import PipelineError
from pipelines.cli.common import (
    DryRun,
    Output,
    app,
    errors,
    open_store,
    stored_config,
    write_reports,
)
from stages.storage import layout

if TYPE_CHECKING:
    from configs.schema import DatasetConfig
    from pipelines.takedown import By, Search
    from stages.storage.store import Store


@app.command()
def takedown(
    output: Output,
    source: Annotated[
        str, typer.Option(help="An image's name in its source; * and ? are wildcards.")
    ] = "",
    hash_: Annotated[
        str, typer.Option("--hash", help="The sha256 of an image file, or the path of the file.")
    ] = "",
    photo: Annotated[
        list[Path] | None,
        typer.Option(
            help="A photograph of a person: removes all images in which a face is like its largest "
            "face. Several photographs find more: repeat the option."
        ),
    ] = None,
    similarity: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="With --photo: the least cosine of similar faces; 0: the embedder's threshold.",
        ),
    ] = 0.0,
    block_person: Annotated[
        bool,
        typer.Option(
            "--block-person",
            help="With --photo: keep the embeddings of the photographs, which are personal data, "
            "and quarantine later images of the person.",
        ),
    ] = False,
    release: Annotated[
        str,
        typer.Option(help="A key or name: makes an image a sample again that was blocked wrongly."),
    ] = "",
    page: Annotated[
        Path, typer.Option(help="Where to write the page that shows the matches.")
    ] = Path("takedown.html"),
    note: Annotated[
        str, typer.Option(help="For the log, such as a ticket number; no personal data.")
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask for confirmation.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Remove images, or all images of a person, permanently.

    Example: python -m pipelines.cli takedown runs/mine --photo ada.jpg --dry-run
    """
    with errors():
        from stages.storage.commit import complete_killed_commits
        from stages.storage.reader import DatasetReader

        options = {"source": source, "hash": hash_, "photo": photo, "release": release}
        chosen = [name for name, value in options.items() if value]
        if len(chosen) != 1:
            raise PipelineError(
                "give one of --source, --hash, --photo and --release; given: "
                f"{', '.join(chosen) or 'none'}."
            )
        if (similarity or block_person) and not photo:
            raise PipelineError("--similarity and --block-person need --photo.")
        store = open_store(output)
        complete_killed_commits(store)
        config = stored_config(store)
        DatasetReader(store).dataset_info()  # the reports need it: an error before the removal
        if release:
            _release(store, config, release, note, dry_run)
            return
        search = _search(store, config, source, hash_, photo or [], similarity)
        _show(store, search, page, dry_run)
        if dry_run:
            return
        if (search.matches or block_person) and not yes:
            what = "remove them permanently?" if search.matches else "keep the embeddings?"
            typer.confirm(what, abort=True)
        _remove(store, config, search, cast("By", chosen[0]), note, block_person)


def _remove(
    store: Store, config: DatasetConfig, search: Search, by: By, note: str, block: bool
) -> None:
    """Removes the matches. If there are none, completes an earlier request that was stopped."""
    from pipelines.takedown import finish, is_unfinished, take_down

    if search.matches or block:
        names = take_down(
            store, config, search.matches, by, note, request=search.request, block=block
        )
        write_reports(store)
        typer.echo(
            f"removed; {len(names)} shards rewritten, logged in {store.url}/{layout.TAKEDOWNS}\n"
            "Delete the files from the source too, and copies of old shards. Adapters that were "
            "trained on them are not changed."
        )
        if block:
            typer.echo(
                f"{store.url}/{layout.TAKEDOWNS} now has embeddings of the person. Later images "
                "in which a face matches are quarantined as blocked_person."
            )
    elif is_unfinished(store, config):
        finish(store, config)
        write_reports(store)
        typer.echo("an earlier request had been stopped; it is complete now")


def _search(
    store: Store,
    config: DatasetConfig,
    source: str,
    hash_: str,
    photos: list[Path],
    similarity: float,
) -> Search:
    """Returns what the given option matches; exactly one is given."""
    from pipelines.takedown import Search, by_hash, by_photo, by_source, digest_of

    if photos:
        return by_photo(store, config, photos, similarity)
    matches = by_hash(store, digest_of(hash_)) if hash_ else by_source(store, source)
    return Search(matches=matches)


def _show(store: Store, search: Search, page: Path, dry_run: bool) -> None:
    """Prints the matches, and writes the page that shows them."""
    from pipelines.inspect.find import printable
    from pipelines.takedown import rates, write_page

    for match in sorted(search.matches, key=lambda match: (match.shard, match.source)):
        name = layout.shard_name(match.shard)
        typer.echo(f"  {name}  {match.key}  {printable(match.source)}  ({match.why})")
    lines = rates(search)
    for line in lines:
        typer.echo(line)
    shards = len({match.shard for match in search.matches})
    would = " would be removed" if dry_run else ""
    typer.echo(f"{len(search.matches)} inputs in {shards} shards{would}")
    if search.matches or search.near:
        left_out = write_page(store, search, page, lines)
        near = f" and {len(search.near)} near misses" if search.request else ""
        without = f", without {left_out:,} of the matches" if left_out else ""
        typer.echo(
            f"{page} shows the matches{near}{without}. It has faces of people: delete it when you "
            "have looked at it."
        )


def _release(store: Store, config: DatasetConfig, text: str, note: str, dry_run: bool) -> None:
    """Releases the record that `text` means, a key, its beginning, or a name."""
    from pipelines.inspect.find import find, inspect
    from pipelines.takedown import check_blocked, release
    from stages.storage.reader import DatasetReader

    reader = DatasetReader(store)
    _, key = find(reader, sorted(reader.manifests()), text)
    check_blocked(store, key)
    if dry_run:
        typer.echo(f"{key} would be released")
        return
    release(store, config, key, note)
    write_reports(store)
    row = inspect(store, key).row
    now = f"is now {row['status']}: {row['reason']}" if row["reason"] else "is a sample again"
    typer.echo(f"{key} {now}; logged in {store.url}/{layout.TAKEDOWNS}")
