"""Version 2 of the format, read as version 3. Nothing writes version 2 any more.

What differs: names of stages, manifest entries, and the review of a sample, which had three lists
of regions (`fused`, `unfused`, `absent`) in place of one status for each region.
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
    """The entries of a version 2 manifest under their names of version 3; `version` stays 2."""
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


def sample(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a version 2 sample in the form of version 3."""
    annotations = {name: meta[name] for name in ("measures", "review") if meta.get(name)}
    if review := annotations.get("review"):
        kept = {name: value for name, value in review.items() if name not in _LISTS}
        statuses = region_statuses(review["fused"], review["unfused"], review["absent"])
        annotations["review"] = {**kept, "regions": statuses}
    return {**meta, **annotations, "annotations": " ".join(sorted(annotations))}


def region_statuses(
    fused: Sequence[str], unfused: Sequence[Sequence[str]], absent: Sequence[str]
) -> list[str]:
    """Review.regions from the three lists; unfused: (region, reason)."""
    statuses = dict.fromkeys(absent, ABSENT)
    statuses.update({region: reason for region, reason in unfused})  # noqa: C416 - lists of two
    statuses |= dict.fromkeys(fused, FUSED)
    return [statuses.get(word, "") for word in REGION_WORDS]


def physical_columns(names: Sequence[str]) -> list[str]:
    """The columns of a version 2 sidecar that hold what version 3 calls `names`."""
    columns: list[str] = []
    for name in names:
        columns += _LISTS if name == "regions" else (_COLUMNS.get(name, name),)
    return [*dict.fromkeys(columns)]


def table(read: pa.Table) -> pa.Table:
    """Columns of a version 2 sidecar under their names, and with the contents, of version 3."""
    if set(_LISTS) <= set(read.column_names):
        columns = [read.column(name).to_pylist() for name in _LISTS]
        statuses = [
            region_statuses(fused, [(u["region"], u["reason"]) for u in unfused], absent)
            if (fused or unfused or absent)
            else []
            for fused, unfused, absent in zip(*columns, strict=True)
        ]
        at = read.column_names.index(_LISTS[0])
        read = read.drop_columns(list(_LISTS))
        read = read.add_column(at, "regions", pa.array(statuses, pa.list_(pa.string())))
    if "stage" in read.column_names:
        stages = [current_stage(stage) for stage in read.column("stage").to_pylist()]
        read = read.set_column(
            read.column_names.index("stage"), "stage", pa.array(stages, pa.string())
        )
    names = {old: new for new, old in _COLUMNS.items()}
    return read.rename_columns([names.get(name, name) for name in read.column_names])
