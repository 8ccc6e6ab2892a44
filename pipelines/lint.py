"""Lint: checks that the files of a data set are complete and match each other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, cast

from configs.errors import ShardError
from pipelines.dedup.global_pass import lint_identities, stale_shards
from pipelines.takedown import lint_removals
from stages.record import Status
from stages.storage import layout
from stages.storage.manifest import Manifest
from stages.storage.reader import DatasetReader
from stages.storage.samples import read_sample
from stages.storage.sidecar import is_quarantined
from stages.storage.store import Store


def lint(store: Store) -> Iterator[str]:
    """Yields a line for each contradiction between manifests, files, sidecars, samples, exclusions
    and identities; none if the data set is correct.
    """
    reader = DatasetReader(store)
    for manifest in stale_shards(store):
        yield (
            f"{manifest.shard}: duplicates or removals are not applied yet. Run the pipeline again."
        )
    for manifest in reader.manifests().values():
        problems = list(_lint_files(store, manifest))
        yield from problems or _lint_samples(reader, manifest)
    yield from lint_removals(store)
    yield from lint_identities(store)


def _lint_files(store: Store, manifest: Manifest) -> Iterator[str]:
    """Compares a shard's files with their digests in the manifest."""
    for file in manifest.files:
        try:
            with store.open(layout.in_shards(file.name)) as stream:
                digest = hashlib.file_digest(cast(Any, stream), "sha256").hexdigest()
                size = stream.tell()
        except FileNotFoundError:
            yield f"{manifest.shard}: {file.name} is missing"
            continue
        if digest != file.sha256:
            yield (
                f"{manifest.shard}: {file.name} is not the file that was committed ({size:,} bytes)"
            )


def _lint_samples(reader: DatasetReader, manifest: Manifest) -> Iterator[str]:
    """Compares a shard's samples with the rows of its sidecar."""
    rows = reader.rows(manifest.index).to_pylist()
    if len(rows) != manifest.inputs:
        yield f"{manifest.shard}: {len(rows)} rows for {manifest.inputs} inputs"
    written = [row for row in rows if row["status"] == Status.OK]
    quarantined = [row for row in rows if is_quarantined(row)]
    for file, chosen in ((manifest.tar, written), (manifest.quarantine, quarantined)):
        if not chosen:
            continue
        if file is None:
            yield f"{manifest.shard}: {len(chosen)} rows are in a tar that is not in its manifest"
            continue
        with reader.store.open(layout.in_shards(file.name)) as tar:
            for row in chosen:
                try:
                    record = read_sample(tar, row)
                except ShardError as error:
                    yield f"{manifest.shard}: {error}"
                    continue
                names = ("source", "sha256", "caption", "license")
                if any(getattr(record, name) != row[name] for name in names):
                    yield f"{manifest.shard}: sample {row['key']} differs from its row"
