"""Stats: every figure of the report.

`data` follows from the sidecars, identities.parquet and takedown.jsonl alone, so anyone can
recompute it and equal shards give equal figures. What varies from run to run (seconds, images per
second) stands apart under `runs`, and comes from the manifests. A ledger that doesn't balance, or a
manifest that its sidecar contradicts, is an error and never a number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from configs.errors import ShardError
from pipelines.report.distribution import Floats, Sums, median, rounded, spread
from pipelines.report.drift import Track, flags
from pipelines.report.identities import identity_figures, takedowns
from pipelines.report.metrics import FIGURES
from pipelines.report.runs import chain_figures, plan_figures, run_figures
from pipelines.report.scan import EXAMPLES, End, Row, Scan, scan
from stages.record import Status
from stages.regions import LABELS, REGION_WORDS
from stages.storage.commit import manifests
from stages.storage.store import Store

_ENDED: Final = (Status.DROPPED, Status.FAILED)
_CUT: Final = next(at for at, figure in enumerate(FIGURES) if figure.name == "cut")
_THREADS: Final = 4
_NAMED: Final = 20  # licences named one by one
_CHAIN: Final = (  # as records go through it; a stage not named here comes after those that are
    *(
        "source",
        "rights",
        "resize",
        "thumbnail",
        "detect",
        "parse",
        "embed",
        "measure",
        "quality_filter",
        "caption",
        "review",
    ),
    *("neighbours", "takedown"),
)


@dataclass(frozen=True, slots=True)
class Report:
    """stats: ready for JSON. shards: a row for each. examples: reason → (shard's index, row) of its
    first records.
    """

    stats: dict[str, Any]
    shards: pa.Table
    examples: dict[End, list[tuple[int, int]]]
    manifests: Sequence[Row]


def compute_stats(store: Store) -> dict[str, Any]:
    """The report's figures, ready for JSON: see `compute`."""
    return compute(store).stats


def compute(store: Store) -> Report:
    """data: from the shards alone. runs: times of each shard's last run. plan: shards and inputs
    that the kept plan holds, None without one. chains: the stage signatures that shards were made
    with, more than one while a changed configuration is not run to its end. Raises ShardError if
    there is no shard, or one contradicts itself.
    """
    found = list(manifests(store))
    if not found:
        raise ShardError(
            f"{store.url} holds no committed shard: there is nothing to report. Run the data set "
            "first."
        )
    sums, label_sums = Sums(len(FIGURES)), Sums(len(LABELS))
    scans, means, medians, counts = [], [], [], []
    for part in scan(store, found):
        ordered = np.sort(part.values, axis=1)  # NaN comes last
        count = (~np.isnan(part.values)).sum(1)
        means.append(
            [
                total / n if n else np.nan
                for total, n in zip(sums.add(part.values), count, strict=True)
            ]
        )
        medians.append(
            [
                median(row[:n]) if n else np.nan
                for row, n in zip(ordered, count.tolist(), strict=True)
            ]
        )
        counts.append(count)
        label_sums.add(_present(part.labels))
        scans.append(part)
    spreads = _spreads(scans, sums)
    tally = sum((part.tally for part in scans), Counter[tuple[str, ...]]())
    examples: dict[End, list[tuple[int, int]]] = {}
    for part in scans:
        for end, rows in part.first.items():
            first = examples.setdefault(end, [])
            first += [(part.index, row) for row in rows[: EXAMPLES - len(first)]]
    runs = run_figures(found)
    table, drift = _shard_table(
        scans, spreads, runs, np.array(means), np.array(medians), np.array(counts)
    )
    data = {
        **_ledger(scans),
        "shards": [_shard(part) for part in scans],
        "figures": spreads,
        "regions": {word: _region(word, tally) for word in REGION_WORDS},
        "labels": _labels(scans, label_sums),
        "image_sizes": _sizes(tally),
        "cut": sum(int((part.values[_CUT] > 0).sum()) for part in scans),
        "trainable": {name: tally["trainable", name] for name in ("yes", "no", "unknown")},
        "licenses": _named("license", tally),
        "consents": _named("consent", tally),
        "identities": identity_figures(store),
        "takedowns": takedowns(store),
        "drift": drift,
    }
    stats = {
        "data": data,
        "runs": runs,
        "plan": plan_figures(store),
        "chains": chain_figures(found),
    }
    return Report(stats, table, examples, found)


def _shard(part: Scan) -> dict[str, Any]:
    return {
        "shard": part.name,
        "inputs": part.inputs,
        **{
            name: part.of(status)
            for name, status in (("written", "ok"), ("dropped", "dropped"), ("failed", "failed"))
        },
        "tar_bytes": part.tar_bytes,
        "held_bytes": part.held_bytes,
    }


def _ledger(scans: Sequence[Scan]) -> dict[str, Any]:
    """inputs = written + dropped by reason + failed by reason; the scan has checked it shard by
    shard.
    """
    total: Counter[End] = Counter()
    for part in scans:
        total.update(part.counts)
    inputs, written = (
        total.total(),
        sum(count for end, count in total.items() if end[0] == Status.OK),
    )
    by_reason: dict[str, Counter[str]] = {status.value: Counter() for status in _ENDED}
    by_stage: dict[str, Counter[str]] = {}
    for (status, stage, reason), count in total.items():
        if status != Status.OK:
            by_reason[status][reason] += count
            by_stage.setdefault(stage, Counter())[status] += count
    reasons = sorted(total.items(), key=lambda item: (item[0][0], -item[1], item[0]))
    return {
        "inputs": inputs,
        "written": written,
        **{status: dict(sorted(counts.items())) for status, counts in by_reason.items()},
        "funnel": _funnel(inputs, by_stage),
        "reasons": [
            {"status": status, "stage": stage, "reason": reason, "count": count}
            for (status, stage, reason), count in reasons
            if status != Status.OK
        ],
    }


def _funnel(inputs: int, by_stage: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    """Stages that lost something, in the chain's order: how many came, how many were lost there,
    how many went on.
    """
    steps = []
    known = {stage: place for place, stage in enumerate(_CHAIN)}
    for stage in sorted(by_stage, key=lambda stage: (known.get(stage, len(known)), stage)):
        lost = {status.value: by_stage[stage].get(status, 0) for status in _ENDED}
        left = inputs - sum(lost.values())
        steps.append({"stage": stage, "entered": inputs, **lost, "left": left})
        inputs = left
    return steps


# ------------------------------------------------------------------------------------------ what wa


def _spreads(scans: Sequence[Scan], sums: Sums) -> dict[str, Any]:
    """Of each figure over all written samples."""
    totals = sums.totals()

    def one(at: int) -> dict[str, Any]:
        return spread(
            _sorted([part.values[at] for part in scans]), totals[at], whole=FIGURES[at].whole
        )

    with ThreadPoolExecutor(_THREADS) as pool:  # sorting leaves Python alone
        return dict(
            zip(
                (figure.name for figure in FIGURES), pool.map(one, range(len(FIGURES))), strict=True
            )
        )


def _labels(scans: Sequence[Scan], sums: Sums) -> dict[str, Any]:
    """Of each label: in how many pictures there is none, and its share of each picture that has
    any.
    """
    totals = sums.totals()

    def one(at: int) -> dict[str, Any]:
        every = _sorted([part.labels[at] for part in scans])
        present = every[np.searchsorted(every, 0, "right") :]
        return _missing(len(every) - len(present), len(every)) | {
            "area": spread(present, totals[at])
        }

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(LABELS, pool.map(one, range(len(LABELS))), strict=True))


def _sorted(parts: Sequence[Floats]) -> Floats:
    values = np.concatenate(parts)
    values = values[~np.isnan(values)]
    values.sort()
    return values


def _present(labels: Floats) -> Floats:
    return np.where(labels > 0, labels, np.nan)


def _region(word: str, tally: Mapping[tuple[str, ...], int]) -> dict[str, Any]:
    """missing: of the samples with a label map. fused, unfused by reason: what the trainer makes of
    it. absent: named by a caption and not in the label map.
    """
    unfused = {
        key[2]: count for key, count in sorted(tally.items()) if key[:2] == ("unfused", word)
    }
    return _missing(tally["missing", word], tally["parsed",]) | {
        "fused": tally["fused", word],
        "unfused": unfused,
        "absent": tally["absent", word],
    }


def _missing(missing: int, total: int) -> dict[str, Any]:
    return {"missing": missing, "missing_rate": rounded(missing / total) if total else None}


def _sizes(tally: Mapping[tuple[str, ...], int]) -> list[dict[str, int]]:
    sizes = [(int(key[1]), int(key[2]), count) for key, count in tally.items() if key[0] == "size"]
    sizes.sort(key=lambda size: (-size[2], size))
    return [{"width": width, "height": height, "count": count} for width, height, count in sizes]


def _named(kind: str, tally: Mapping[tuple[str, ...], int]) -> dict[str, Any]:
    """The most common ones by name, the rest together."""
    found = sorted(
        ((key[1], count) for key, count in tally.items() if key[0] == kind),
        key=lambda p: (-p[1], p[0]),
    )
    named = [{"name": name, "count": count} for name, count in found[:_NAMED]]
    return {
        "named": named,
        "others": len(found[_NAMED:]),
        "others_count": sum(count for _, count in found[_NAMED:]),
    }


# ------------------------------------------------------------------------------------------ shard b


def _shard_table(
    scans: Sequence[Scan], spreads: Row, runs: Row, means: Floats, medians: Floats, counts: Floats
) -> tuple[pa.Table, dict[str, Any]]:
    """(report/stats.parquet: a row for each shard; the stats' entry on drift)."""
    names = [part.name for part in scans]
    columns: dict[str, Any] = {
        name: [_shard(part)[name] for part in scans] for name in _shard(scans[0])
    }
    columns["seconds"] = [run["seconds"] for run in runs["shards"]]
    columns["images_per_second"] = [run["images_per_second"] for run in runs["shards"]]
    for stage in runs["stage_seconds"]:
        columns[f"seconds_{stage}"] = [run["stage_seconds"].get(stage) for run in runs["shards"]]
    tracks = _rates(scans)
    columns |= {track.name: _nulls(track.values) for track in tracks}
    for at, figure in enumerate(FIGURES):
        columns[f"{figure.name}_count"] = counts[:, at]
        columns[f"{figure.name}_mean"] = _nulls(means[:, at])
        columns[f"{figure.name}_median"] = _nulls(medians[:, at])
        found = spreads[figure.name]
        if found["count"]:
            scale = (
                _deviation(found, scans, at) if figure.whole else found["upper"] - found["lower"]
            )
            values = means[:, at] if figure.whole else medians[:, at]
            tracks.append(Track(figure.name, values, counts[:, at], scale))
    drift = {}
    for track in tracks:
        entry, away = flags(track, names)
        drift[track.name] = entry
        columns[f"{track.name}_away"] = _nulls(away)
    return pa.table(columns), drift


def _deviation(found: Row, scans: Sequence[Scan], at: int) -> float:
    """Standard deviation of whole numbers, from exact sums."""
    squares = sum(int(np.nansum(np.square(part.values[at]))) for part in scans)
    total = sum(int(np.nansum(part.values[at])) for part in scans)
    return float(np.sqrt((found["count"] * squares - total**2) / found["count"] ** 2))


def _rates(scans: Sequence[Scan]) -> list[Track]:
    """Shares of a shard: of its inputs that were written, of its samples that can be trained on,
    lose text, lack a region.
    """
    inputs = np.array([part.inputs for part in scans], float)
    written = np.array([part.of(Status.OK) for part in scans], float)
    reviewed = np.array(
        [part.tally["trainable", "yes"] + part.tally["trainable", "no"] for part in scans], float
    )
    parsed = np.array([part.tally["parsed",] for part in scans], float)
    shares = [
        ("written_share", written, inputs),
        ("trainable_share", [part.tally["trainable", "yes"] for part in scans], reviewed),
        ("cut_share", [int((part.values[_CUT] > 0).sum()) for part in scans], reviewed),
        *(
            (f"missing_{w}_share", [part.tally["missing", w] for part in scans], parsed)
            for w in REGION_WORDS
        ),
    ]
    with np.errstate(invalid="ignore"):
        return [
            Track(name, np.asarray(some, float) / whole, whole, None)
            for name, some, whole in shares
        ]


def _nulls(values: Floats) -> pa.Array:
    """NaN and infinity become null: a table has no such numbers."""
    return pa.array(values, pa.float64(), mask=~np.isfinite(values))
