"""Stats: every number of the report.

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
from pipelines.report.identities import identity_summary, takedowns
from pipelines.report.metrics import ShownMetric, shown_metrics
from pipelines.report.runs import chain_summary, plan_summary, run_summary
from pipelines.report.scan import EXAMPLES, End, Scan, scan
from pipelines.report.shard_table import Shards, shard_entry, shard_table
from stages.fields import Column
from stages.record import Status
from stages.regions import LABELS, REGION_WORDS
from stages.storage.exclusions import GLOBAL_PASS, TAKEDOWN
from stages.storage.manifest import Manifest
from stages.storage.reader import DatasetReader
from stages.storage.sidecar import KNOWN
from stages.storage.store import Store

_ENDED: Final = (Status.DROPPED, Status.FAILED)
_THREADS: Final = 4
_NAMED: Final = 20  # licences named one by one


@dataclass(frozen=True, slots=True)
class Report:
    """stats: JSON-ready. shards: a row for each. examples: (status, stage, reason) → (shard's
    index, row) of its first records. tally: counts over all written samples, see scan.Scan.
    metrics: those that `stats` and the page show. columns: of the sidecars, by name.
    """

    stats: dict[str, Any]
    shards: pa.Table
    examples: dict[End, list[tuple[int, int]]]
    tally: Counter[tuple[str, ...]]
    manifests: Sequence[Manifest]
    metrics: tuple[ShownMetric, ...]
    columns: Mapping[str, Column]


def compute_stats(store: Store) -> dict[str, Any]:
    """The report's numbers, JSON-ready: see `compute`."""
    return compute(DatasetReader(store)).stats


def compute(reader: DatasetReader) -> Report:
    """Reads every sidecar once and computes the report's numbers.

    data: from the shards alone. runs: times of each shard's last run. plan: shards and inputs of
    the plan, None without one. chains: the stage signatures that shards were made with, more than
    one while a changed configuration is not run to its end. Raises ShardError if there is no shard,
    or one contradicts itself.
    """
    manifests = list(reader.manifests().values())
    if not manifests:
        raise ShardError(
            f"{reader} holds no committed shard: there is nothing to report. Run the data set "
            "first."
        )
    columns = {**KNOWN, **reader.columns()}
    metrics = shown_metrics(columns.values())
    sums, label_sums = Sums(len(metrics)), Sums(len(LABELS))
    scans, means, medians, counts = [], [], [], []
    for part in scan(reader, manifests, metrics, columns):
        ordered = np.sort(part.values, axis=1)  # NaN comes last
        count = (~np.isnan(part.values)).sum(1)
        totals = zip(sums.add(part.values), count, strict=True)
        means.append([total / n if n else np.nan for total, n in totals])
        rows = zip(ordered, count.tolist(), strict=True)
        medians.append([median(row[:n]) if n else np.nan for row, n in rows])
        counts.append(count)
        label_sums.add(_present(part.labels))
        scans.append(part)
    shards = Shards(scans, metrics, np.array(means), np.array(medians), np.array(counts))
    spreads = _spreads(shards, sums)
    tally = sum((part.tally for part in scans), Counter[tuple[str, ...]]())
    examples: dict[End, list[tuple[int, int]]] = {}
    for part in scans:
        for end, rows_of_end in part.first.items():
            first = examples.setdefault(end, [])
            more = EXAMPLES - len(first)
            first += [(part.manifest.index, row) for row in rows_of_end[:more]]
    runs = run_summary(manifests)
    table, drift = shard_table(shards, spreads, runs)
    data = {
        **_ledger(scans, _stage_order(manifests)),
        "shards": [shard_entry(part) for part in scans],
        "metrics": spreads,
        "regions": {word: _region(word, tally) for word in REGION_WORDS},
        "labels": _labels(scans, label_sums),
        "image_sizes": _sizes(tally),
        "cut": int(sum(shards.cut)),
        "trainable": {name: tally["trainable", name] for name in ("yes", "no", "unknown")},
        "licenses": _named("license", tally),
        "consents": _named("consent", tally),
        "identities": identity_summary(reader),
        "takedowns": takedowns(reader.store),
        "drift": drift,
    }
    stats = {
        "data": data,
        "runs": runs,
        "plan": plan_summary(reader.store),
        "chains": chain_summary(manifests),
    }
    return Report(stats, table, examples, tally, manifests, metrics, columns)


def _stage_order(manifests: Sequence[Manifest]) -> list[str]:
    """Stages as records go through them, by the signatures of the last shard."""
    names = [signature.rsplit("-", 2)[0] for signature in manifests[-1].signatures]
    return ["source", *names, GLOBAL_PASS, TAKEDOWN]


def _ledger(scans: Sequence[Scan], stages: Sequence[str]) -> dict[str, Any]:
    """inputs = written + dropped by reason + failed by reason; the scan has checked it shard by
    shard.
    """
    total: Counter[End] = Counter()
    for part in scans:
        total.update(part.counts)
    inputs = total.total()
    written = sum(count for end, count in total.items() if end[0] == Status.OK)
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
        "funnel": _funnel(inputs, by_stage, stages),
        "reasons": [
            {"status": status, "stage": stage, "reason": reason, "count": count}
            for (status, stage, reason), count in reasons
            if status != Status.OK
        ],
    }


def _funnel(
    inputs: int, by_stage: Mapping[str, Mapping[str, int]], stages: Sequence[str]
) -> list[dict[str, Any]]:
    """Of each stage that lost inputs, in the order `stages`: how many entered, were lost, and went
    on. Stages that are not in `stages` come last."""
    steps = []
    places = {stage: place for place, stage in enumerate(stages)}
    for stage in sorted(by_stage, key=lambda stage: (places.get(stage, len(places)), stage)):
        lost = {status.value: by_stage[stage].get(status, 0) for status in _ENDED}
        left = inputs - sum(lost.values())
        steps.append({"stage": stage, "entered": inputs, **lost, "left": left})
        inputs = left
    return steps


def _spreads(shards: Shards, sums: Sums) -> dict[str, Any]:
    """The distribution of each metric over all written samples."""
    totals = sums.totals()

    def one(at: int) -> dict[str, Any]:
        values = _sorted([part.values[at] for part in shards.scans])
        return spread(values, totals[at], whole=shards.metrics[at].metric.whole)

    names = [shown.name for shown in shards.metrics]
    with ThreadPoolExecutor(_THREADS) as pool:  # sorting releases Python's lock
        return dict(zip(names, pool.map(one, range(len(names))), strict=True))


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
    pairs = [(key[1], count) for key, count in tally.items() if key[0] == kind]
    pairs.sort(key=lambda pair: (-pair[1], pair[0]))
    rest = pairs[_NAMED:]
    return {
        "named": [{"name": name, "count": count} for name, count in pairs[:_NAMED]],
        "others": len(rest),
        "others_count": sum(count for _, count in rest),
    }
