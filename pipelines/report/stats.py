"""Stats: every number of the report.

`data` is computed from sidecars, identities.parquet and takedown.jsonl only, so equal shards give
equal numbers and anyone can recompute them. Times, which vary from run to run, are under `runs` and
come from the manifests. A shard whose sidecar contradicts its manifest is an error.
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
from pipelines.report.distribution import Floats, Sums, distribution_of, median, rounded
from pipelines.report.identities import identity_summary, takedowns
from pipelines.report.metrics import ShownMetric, shown_metrics
from pipelines.report.runs import chain_summary, plan_summary, run_summary
from pipelines.report.scan import EXAMPLES, Outcome, Scan, scan
from pipelines.report.shard_table import Shards, shard_entry, shard_table
from stages.fields import Column
from stages.record import Status
from stages.regions import LABELS, REGION_WORDS
from stages.storage.exclusions import GLOBAL_PASS, TAKEDOWN, check_log
from stages.storage.manifest import Manifest
from stages.storage.reader import DatasetReader
from stages.storage.sidecar import STANDARD_COLUMNS

_UNWRITTEN: Final = (Status.DROPPED, Status.FAILED)
_THREADS: Final = 4
_LISTED: Final = 20  # licences or consents, the most common ones


@dataclass(frozen=True, slots=True)
class Report:
    """stats: JSON-ready, see `compute`. shards: a table with a row for each shard.

    examples: outcome → (index of the shard, row) of its first records. tally: numbers of samples,
    see scan.Scan. metrics: those that are shown. columns: of the sidecars, by name. lacking: names
    of those that some shards don't have.
    """

    stats: dict[str, Any]
    shards: pa.Table
    examples: dict[Outcome, list[tuple[int, int]]]
    tally: Counter[tuple[str, ...]]
    manifests: Sequence[Manifest]
    metrics: tuple[ShownMetric, ...]
    columns: Mapping[str, Column]
    lacking: frozenset[str]


def compute(reader: DatasetReader) -> Report:
    """Reads every sidecar once and computes the numbers of the report.

    The stats' entries are `data`; `runs`, the times of each shard's last run; `plan`, its shards
    and inputs, or None without a plan; `chains`, the stage signatures of the shards, more than one
    where a run with a changed configuration was not completed. Raises ShardError where there is no
    shard, a sidecar contradicts its manifest, or the removal log is lost.
    """
    manifests = list(reader.manifests().values())
    if not manifests:
        raise ShardError(
            f"{reader} has no committed shard, so there is nothing to report. Run the pipeline "
            "first."
        )
    check_log(reader.store, manifests)
    columns = {**STANDARD_COLUMNS, **reader.columns()}
    metrics = shown_metrics(columns.values())
    sums, label_sums = Sums(len(metrics)), Sums(len(LABELS))
    scans, means, medians, counts = [], [], [], []
    for part in scan(reader, manifests, metrics, columns):
        ordered = np.sort(part.values, axis=1)  # NaN last
        count = (~np.isnan(part.values)).sum(1)
        totals = zip(sums.add(part.values), count, strict=True)
        means.append([total / n if n else np.nan for total, n in totals])
        rows = zip(ordered, count.tolist(), strict=True)
        medians.append([median(row[:n]) if n else np.nan for row, n in rows])
        counts.append(count)
        label_sums.add(_present(part.labels))
        scans.append(part)
    shards = Shards(scans, metrics, np.array(means), np.array(medians), np.array(counts))
    distributions = _distributions(shards, sums)
    tally = sum((part.tally for part in scans), Counter[tuple[str, ...]]())
    examples: dict[Outcome, list[tuple[int, int]]] = {}
    for part in scans:
        for outcome, example_rows in part.examples.items():
            of_outcome = examples.setdefault(outcome, [])
            more = EXAMPLES - len(of_outcome)
            of_outcome += [(part.manifest.index, row) for row in example_rows[:more]]
    runs = run_summary(manifests)
    table, drift = shard_table(shards, distributions, runs)
    data = {
        **_ledger(scans, _stage_order(manifests)),
        "shards": [shard_entry(part) for part in scans],
        "metrics": distributions,
        "regions": {word: _region(word, tally) for word in REGION_WORDS},
        "labels": _labels(scans, label_sums),
        "image_sizes": _sizes(tally),
        "cut": int(sum(shards.cut)),
        "contradicted": int(sum(shards.positive("contradictions"))),
        "trainable": {name: tally["trainable", name] for name in ("yes", "no", "unknown")},
        "licenses": _most_common("license", tally),
        "consents": _most_common("consent", tally),
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
    lacking = frozenset[str]().union(*(part.lacking for part in scans))
    return Report(stats, table, examples, tally, manifests, metrics, columns, lacking)


def _stage_order(manifests: Sequence[Manifest]) -> list[str]:
    """Names of the stages in the order of the last shard's signatures, with what comes before and
    after them."""
    names = [signature.rsplit("-", 2)[0] for signature in manifests[-1].signatures]
    return ["source", *names, GLOBAL_PASS, TAKEDOWN]


def _ledger(scans: Sequence[Scan], stages: Sequence[str]) -> dict[str, Any]:
    """inputs = written + dropped (by reason) + failed (by reason), checked for each shard by the
    scan; the inputs that each stage lost; and the reasons, the most frequent first."""
    total: Counter[Outcome] = Counter()
    for part in scans:
        total.update(part.counts)
    inputs = total.total()
    written = sum(count for outcome, count in total.items() if outcome[0] == Status.OK)
    by_reason: dict[str, Counter[str]] = {status.value: Counter() for status in _UNWRITTEN}
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
    """For each stage that dropped or failed inputs: how many entered it, were dropped, failed, and
    were left. Ordered as `stages`; others are last."""
    steps = []
    places = {stage: place for place, stage in enumerate(stages)}
    for stage in sorted(by_stage, key=lambda stage: (places.get(stage, len(places)), stage)):
        lost = {status.value: by_stage[stage].get(status, 0) for status in _UNWRITTEN}
        left = inputs - sum(lost.values())
        steps.append({"stage": stage, "entered": inputs, **lost, "left": left})
        inputs = left
    return steps


def _distributions(shards: Shards, sums: Sums) -> dict[str, Any]:
    """The distribution of each metric over all samples."""
    totals = sums.totals()

    def one(at: int) -> dict[str, Any]:
        values = _sorted([part.values[at] for part in shards.scans])
        return distribution_of(values, totals[at], whole=shards.metrics[at].metric.whole)

    names = [shown.name for shown in shards.metrics]
    with ThreadPoolExecutor(_THREADS) as pool:  # sorting releases Python's lock
        return dict(zip(names, pool.map(one, range(len(names))), strict=True))


def _labels(scans: Sequence[Scan], sums: Sums) -> dict[str, Any]:
    """For each label: the number of samples without it, and the distribution of its area over the
    others."""
    totals = sums.totals()

    def one(at: int) -> dict[str, Any]:
        areas = _sorted([part.labels[at] for part in scans])
        present = areas[np.searchsorted(areas, 0, "right") :]
        missing = _missing(len(areas) - len(present), len(areas))
        return missing | {"area": distribution_of(present, totals[at])}

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
    """Numbers of samples by a region's status (see Review.regions), `unfused` by reason; missing:
    samples whose label map doesn't show it."""
    unfused = {
        key[2]: count for key, count in sorted(tally.items()) if key[:2] == ("unfused", word)
    }
    return _missing(tally["missing", word], tally["parsed",]) | {
        "fused": tally["fused", word],
        "unfused": unfused,
        "absent": tally["absent", word],
    }


def _missing(missing: int, total: int) -> dict[str, Any]:
    """total: samples with a label map."""
    return {"missing": missing, "missing_rate": rounded(missing / total) if total else None}


def _sizes(tally: Mapping[tuple[str, ...], int]) -> list[dict[str, int]]:
    """Image sizes and their numbers of samples, the most common first."""
    sizes = [(int(key[1]), int(key[2]), count) for key, count in tally.items() if key[0] == "size"]
    sizes.sort(key=lambda size: (-size[2], size))
    return [{"width": width, "height": height, "count": count} for width, height, count in sizes]


def _most_common(kind: str, tally: Mapping[tuple[str, ...], int]) -> dict[str, Any]:
    """named: the most common texts and their numbers of samples. others, others_count: number of
    the other texts, and of their samples."""
    pairs = [(key[1], count) for key, count in tally.items() if key[0] == kind]
    pairs.sort(key=lambda pair: (-pair[1], pair[0]))
    rest = pairs[_LISTED:]
    return {
        "named": [{"name": name, "count": count} for name, count in pairs[:_LISTED]],
        "others": len(rest),
        "others_count": sum(count for _, count in rest),
    }
