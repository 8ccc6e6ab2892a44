"""Compares an output, file by file, with that of a fresh run.

See `incremental` for what is promised. One thing isn't: which captions a record has that the
quality filter dropped. A fresh run has none, since such a record is never captioned; a record that
was captioned before keeps its captions. They also decide where quarantined samples lie in their
tar, and the sidecar's digest, which `identities.parquet` holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Final

from stages.annotations import Measures
from stages.quality_filter import QualityFilterStage
from stages.record import Record
from stages.storage import layout
from stages.storage.layout import DUPLICATES, IDENTITIES, PLAN, SHARDS
from stages.storage.manifest import Manifest
from stages.storage.reader import DatasetReader
from stages.storage.samples import to_members
from stages.storage.sidecar import Row, is_quarantined
from stages.storage.store import Store

# sidecar columns of a quarantined sample
_PLACE: Final = ("quarantine_offset", "quarantine_size", "members", "sample_sha256")
_CAPTIONS: Final = ("caption", "face_caption")


def compare(store: Store, fresh: Store, folder: Path, fresh_folder: Path) -> None:
    """Raises AssertionError unless the output equals the fresh run's wherever that is promised.

    Each output, and the source it was made from, lies in a folder of its own.
    """
    # sizes and versions of vanished inputs are those of another time
    plan, fresh_plan = (
        s.table(PLAN, ["shard", "key", "source", "duplicate_of"]) for s in (store, fresh)
    )
    assert plan.to_pylist() == fresh_plan.to_pylist(), PLAN
    assert store.read(DUPLICATES) == fresh.read(DUPLICATES), DUPLICATES
    for name in (layout.CONFIG, layout.DATASET):
        text = store.read(name).decode().replace(str(folder), "")
        assert text == fresh.read(name).decode().replace(str(fresh_folder), ""), name
    assert store.names(SHARDS) == fresh.names(SHARDS)
    manifests = DatasetReader(fresh).manifests()
    same = [
        _compare_shard(store, fresh, index, manifest, manifests[index])
        for index, manifest in DatasetReader(store).manifests().items()
    ]
    if all(same):
        assert store.read(IDENTITIES) == fresh.read(IDENTITIES), IDENTITIES
    else:
        people, fresh_people = store.table(IDENTITIES), fresh.table(IDENTITIES)
        assert people.to_pylist() == fresh_people.to_pylist(), IDENTITIES
        assert people.schema.metadata[b"split"] == fresh_people.schema.metadata[b"split"]


def _compare_shard(
    store: Store, fresh: Store, index: int, manifest: Manifest, fresh_manifest: Manifest
) -> bool:
    """Returns False where captions of dropped records differ."""
    tar, quarantine, sidecar = (
        layout.in_shards(name(index))
        for name in (layout.tar, layout.quarantine_tar, layout.sidecar)
    )
    assert store.read(tar) == fresh.read(tar), tar
    rows, fresh_rows = (DatasetReader(s).rows(index).to_pylist() for s in (store, fresh))
    assert _promised(rows) == _promised(fresh_rows), sidecar
    varying = {"run", "inputs_digest"}  # the digest is of a plan, which is compared already
    same = bool(rows == fresh_rows)
    if same:
        for file in (sidecar, quarantine):
            assert not store.exists(file) or store.read(file) == fresh.read(file), file
    else:
        samples, fresh_samples = (
            [
                _promised_members(record)
                for record in DatasetReader(s).records(index)
                if record.quarantined
            ]
            for s in (store, fresh)
        )
        assert samples == fresh_samples, quarantine
        varying |= {"sidecar", "quarantine"}
    for name in {field.name for field in fields(Manifest)} - varying:
        assert getattr(manifest, name) == getattr(fresh_manifest, name), f"{tar}: {name}"
    return same


def _promised(rows: Sequence[Row]) -> list[Row]:
    """The rows without what isn't promised."""
    return [
        {
            column: value
            for column, value in row.items()
            if not (column in _PLACE and is_quarantined(row))
            and not (column in _CAPTIONS and row["stage"] == QualityFilterStage.name)
        }
        for row in rows
    ]


def _promised_members(record: Record) -> dict[str, bytes]:
    """extension → bytes of a quarantined sample, without captions that aren't promised."""
    if record.stage == QualityFilterStage.name:
        record = replace(record, caption="", face_caption="")
    return to_members(record, (Measures,))
