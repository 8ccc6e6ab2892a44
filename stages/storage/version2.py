"""Converts what is read of version 2 of the format to version 3. Version 2 is no longer written.

The differences are names of stages, of columns and of manifest entries, and the review of a sample,
which had three lists of regions (`fused`, `unfused`, `absent`) instead of a status for each region.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import pyarrow as pa

from stages.annotations import ABSENT, FUSED
from stages.base import current_signature, current_stage
from stages.regions import REGION_WORDS

_COLUMNS: Final = {"quarantine_offset": "held_offset", "quarantine_size": "held_size"}
_LISTS: Final = ("fused", "unfused", "absent")


def manifest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a version 2 manifest with the names of version 3. Its `version` stays 2."""
    files, run = values["files"], dict(values["run"])
    for name in ("stage_seconds", "stage_counts"):
        run[name] = {current_stage(stage): value for stage, value in run.get(name, {}).items()}
    return {
        **values,
        "version": 2,
        "exclusions": values["verdicts"],
        "signatures": [current_signature(signature) for signature in values["signatures"]],
        "tar": files["tar"],
        "quarantine": files.get("held"),
        "sidecar": files["parquet"],
        "run": run,
    }


def dataset_info(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the contents of dataset.json with the current names of the stages."""
    backends: Mapping[str, str] = values.get("backends", {})
    names = {
        "stages": [current_stage(name) for name in values.get("stages", [])],
        "signatures": [current_signature(each) for each in values.get("signatures", [])],
        "backends": {current_stage(stage): backend for stage, backend in backends.items()},
    }
    return {name: names.get(name, value) for name, value in values.items()}


def sample(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON of a version 2 sample as that of version 3."""
    annotations = {name: meta[name] for name in ("measures", "review") if meta.get(name)}
    if review := annotations.get("review"):
        unchanged = {name: value for name, value in review.items() if name not in _LISTS}
        statuses = region_statuses(review["fused"], review["unfused"], review["absent"])
        annotations["review"] = {**unchanged, "regions": statuses}
    return {**meta, **annotations, "annotations": " ".join(sorted(annotations))}


def region_statuses(
    fused: Sequence[str], unfused: Sequence[Sequence[str]], absent: Sequence[str]
) -> list[str]:
    """Returns Review.regions from the three lists. unfused: (region, reason) pairs."""
    statuses = dict.fromkeys(absent, ABSENT)
    statuses.update({region: reason for region, reason in unfused})  # noqa: C416 - lists of two
    statuses |= dict.fromkeys(fused, FUSED)
    return [statuses.get(word, "") for word in REGION_WORDS]


def physical_columns(names: Sequence[str]) -> list[str]:
    """Returns the columns of a version 2 sidecar from which `table` makes the columns `names`."""
    columns: list[str] = []
    for name in names:
        columns += _LISTS if name == "regions" else (_COLUMNS.get(name, name),)
    return [*dict.fromkeys(columns)]


def table(rows: pa.Table) -> pa.Table:
    """Returns columns of a version 2 sidecar with the names and values of version 3."""
    if set(_LISTS) <= set(rows.column_names):
        columns = [rows.column(name).to_pylist() for name in _LISTS]
        statuses = [
            region_statuses(fused, [(u["region"], u["reason"]) for u in unfused], absent)
            if (fused or unfused or absent)
            else []
            for fused, unfused, absent in zip(*columns, strict=True)
        ]
        at = rows.column_names.index(_LISTS[0])
        rows = rows.drop_columns(list(_LISTS))
        rows = rows.add_column(at, "regions", pa.array(statuses, pa.list_(pa.string())))
    if "stage" in rows.column_names:
        stages = [current_stage(stage) for stage in rows.column("stage").to_pylist()]
        rows = rows.set_column(
            rows.column_names.index("stage"), "stage", pa.array(stages, pa.string())
        )
    names = {old: new for new, old in _COLUMNS.items()}
    return rows.rename_columns([names.get(name, name) for name in rows.column_names])
