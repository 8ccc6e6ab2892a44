"""The report's numbers, computed again row by row in plain Python, to check the report."""

from __future__ import annotations

import json
import math
import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from configs.schema import DatasetConfig
from pipelines.chain import build_chain
from stages.regions import LABELS, REGION_LABELS, REGION_WORDS

Row = dict[str, Any]
ORDER = [
    "source",
    *(stage.name for stage in build_chain(DatasetConfig())),
    *("global_pass", "takedown"),
]
PLAIN = [
    *("score", "face_count", "face_side", "sharpness", "brightness", "clipped", "occlusion"),
    *("yaw", "pitch", "roll", "identity_norm"),
    *("caption_tokens", "face_caption_tokens", "text_tokens", "cut"),
]
WHOLE = {"face_count", "source_side", "caption_tokens", "face_caption_tokens", "text_tokens"}
WHOLE |= {f"words_{word}" for word in REGION_WORDS}
CLAIMS = ("checked_claims", "contradictions")  # the synthetic set has none
WHOLE |= {*CLAIMS}
METRICS = [
    *PLAIN,
    "source_side",
    *(f"{kind}_{word}" for kind in ("area", "words") for word in REGION_WORDS),
]


def shard_rows(folder: Path) -> dict[str, list[Row]]:
    """shard → its sidecar's rows."""
    return {
        path.stem: pq.read_table(path).to_pylist()
        for path in sorted(folder.glob("shards/*.parquet"))
    }


def value(row: Row, metric: str) -> float | None:
    """A row's value of a metric, None where it has none."""
    kind, _, word = metric.partition("_")
    if metric == "source_side":
        return min(row["source_width"], row["source_height"])
    if kind == "area" and word in REGION_WORDS:
        return area(row, REGION_LABELS[word]) or None
    if kind == "words" and word in REGION_WORDS:
        return row["region_words"][REGION_WORDS.index(word)] if row["region_words"] else None
    number: float | None = row.get(metric)
    return number


def status_of(row: Row, word: str) -> str:
    """The status of a region, see Review.regions."""
    return row["regions"][REGION_WORDS.index(word)] if row["regions"] else ""


def area(row: Row, labels: Iterable[str]) -> float:
    return (
        sum((row["label_areas"][LABELS.index(label)] for label in labels), 0.0)
        if row["label_areas"]
        else 0.0
    )


def values(rows: Iterable[Row], metric: str) -> list[float]:
    return [number for row in rows if (number := value(row, metric)) is not None]


def written(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["status"] == "ok"]


def check_distribution(distribution: dict[str, Any], numbers: Sequence[float]) -> None:
    """Checks every statistic of `numbers`, and that each of them is in one bin."""
    assert distribution["count"] == len(numbers)
    if not numbers:
        assert (
            distribution["edges"] == distribution["counts"] == [] and distribution["mean"] is None
        )
        return
    lower, _, upper = (
        statistics.quantiles(numbers, n=4, method="inclusive") if len(numbers) > 1 else numbers * 3
    )
    assert {
        name: distribution[name] for name in ("min", "lower", "median", "upper", "mean", "max")
    } == {
        "min": round(min(numbers), 6),
        "lower": round(lower, 6),
        "median": round(statistics.median(numbers), 6),
        "upper": round(upper, 6),
        "mean": round(math.fsum(numbers) / len(numbers), 6),
        "max": round(max(numbers), 6),
    }
    edges = distribution["edges"]
    bins = Counter(bisect_right(edges, number) - 1 for number in numbers)
    assert distribution["counts"] == [bins[at] for at in range(len(edges) - 1)]
    assert sum(distribution["counts"]) == len(numbers)


def check_data(data: dict[str, Any], folder: Path) -> None:
    """Checks every entry of the stats' `data`, and that there are no others. Empties `data`."""
    shards = shard_rows(folder)
    rows = [row for part in shards.values() for row in part]
    ok = written(rows)
    assert data.pop("inputs") == len(rows)
    assert data.pop("written") == len(ok)
    for status in ("dropped", "failed"):
        assert data.pop(status) == dict(
            Counter(row["reason"] for row in rows if row["status"] == status)
        )
    _check_funnel(data.pop("funnel"), rows)
    _check_reasons(data.pop("reasons"), rows)
    for entry, (name, part) in zip(data.pop("shards"), shards.items(), strict=True):
        states = Counter(row["status"] for row in part)
        assert entry == {
            "shard": name,
            "inputs": len(part),
            "written": states["ok"],
            "dropped": states["dropped"],
            "failed": states["failed"],
            "tar_bytes": sum(row["tar_size"] for row in part),
            "quarantine_bytes": sum(row["quarantine_size"] for row in part),
        }
    distributions = data.pop("metrics")
    assert {*METRICS} <= {*distributions}
    for metric, distribution in distributions.items():
        check_distribution(distribution, values(ok, metric))
    _check_regions(data.pop("regions"), data.pop("labels"), ok)
    sizes = {(entry["width"], entry["height"]): entry["count"] for entry in data.pop("image_sizes")}
    assert sizes == Counter((row["width"], row["height"]) for row in ok)
    answers = Counter({True: "yes", False: "no", None: "unknown"}[row["trainable"]] for row in ok)
    assert data.pop("trainable") == {name: answers[name] for name in ("yes", "no", "unknown")}
    assert data.pop("cut") == sum((row["cut"] or 0) > 0 for row in ok)
    assert data.pop("contradicted") == sum((row.get("contradictions") or 0) > 0 for row in ok)
    for kind, name in (("licenses", "license"), ("consents", "consent")):
        entry = data.pop(kind)
        assert {e["name"]: e["count"] for e in entry["named"]} == Counter(row[name] for row in ok)
        assert entry["others"] == entry["others_count"] == 0
    _check_identities(data.pop("identities"), folder)
    log = folder / "takedown.jsonl"
    lines = (
        [json.loads(line) for line in log.read_text().split("\n") if line] if log.exists() else []
    )
    assert data.pop("takedowns") == [
        {k: e[k] for k in ("time", "by", "inputs", "note")}
        | {
            "shards": len(e["removed"]),
            "keys": len([key for keys in e["removed"].values() for key in keys]),
        }
        for e in lines
    ]
    check_drift(data.pop("drift"), shards)
    assert not data, f"not recomputed: {list(data)}"


def _check_funnel(funnel: list[Row], rows: list[Row]) -> None:
    ended = [row for row in rows if row["status"] != "ok"]
    stages = sorted({row["stage"] for row in ended}, key=ORDER.index)
    assert [step["stage"] for step in funnel] == stages
    left = len(rows)
    for step in funnel:
        lost = Counter(row["status"] for row in ended if row["stage"] == step["stage"])
        assert (step["entered"], step["dropped"], step["failed"]) == (
            left,
            lost["dropped"],
            lost["failed"],
        )
        left -= lost.total()
        assert step["left"] == left


def _check_reasons(reasons: list[Row], rows: list[Row]) -> None:
    assert sum(entry["count"] for entry in reasons) == sum(row["status"] != "ok" for row in rows)
    for entry in reasons:
        same = [
            row
            for row in rows
            if all(row[column] == entry[column] for column in ("status", "stage", "reason"))
        ]
        assert entry["count"] == len(same)
        assert entry["examples"] == [
            {name: row[name] for name in ("key", "source", "detail")} for row in same[:8]
        ]


def _check_regions(regions: Row, labels: Row, ok: list[Row]) -> None:
    parsed = [row for row in ok if row["label_areas"]]
    for word in REGION_WORDS:
        missing = sum(area(row, REGION_LABELS[word]) == 0 for row in parsed)
        statuses = Counter(status_of(row, word) for row in ok)
        assert regions[word] == {
            "missing": missing,
            "missing_rate": round(missing / len(parsed), 6) if parsed else None,
            "fused": statuses["fused"],
            "unfused": {s: n for s, n in statuses.items() if s not in ("fused", "absent", "")},
            "absent": statuses["absent"],
        }
    assert list(labels) == list(LABELS)
    for label in LABELS:
        shares = [area(row, [label]) for row in parsed]
        present = [share for share in shares if share > 0]
        missing = len(shares) - len(present)
        assert labels[label]["missing"] == missing
        assert labels[label]["missing_rate"] == (
            round(missing / len(shares), 6) if shares else None
        )
        check_distribution(labels[label]["area"], present)


def _check_identities(summary: Row | None, folder: Path) -> None:
    if not (folder / "identities.parquet").exists():
        assert summary is None
        return
    assert summary is not None
    rows = pq.read_table(folder / "identities.parquet").to_pylist()
    sizes = Counter(row["identity_id"] for row in rows)
    assert (summary["count"], summary["samples"]) == (len(sizes), len(rows))
    assert summary["sizes"] == {str(size): count for size, count in Counter(sizes.values()).items()}
    largest = sorted(sizes.items(), key=lambda pair: (-pair[1], pair[0]))[:12]
    assert summary["largest"] == [{"identity": name, "count": count} for name, count in largest]
    for split in {row["split"] for row in rows}:
        some = [row for row in rows if row["split"] == split]
        people = len({row["identity_id"] for row in some})
        assert summary["splits"].pop(split) == {"samples": len(some), "identities": people}
    assert not summary["splits"]
    check_distribution(
        summary["similarity"], [row["similarity"][0] for row in rows if row["similarity"]]
    )


def rates(rows: list[Row]) -> dict[str, tuple[int, int]]:
    """name → (some, of how many) of a shard's shares."""
    ok = written(rows)
    reviewed = [row for row in ok if row["trainable"] is not None]
    parsed = [row for row in ok if row["label_areas"]]
    return {
        "written_share": (len(ok), len(rows)),
        "trainable_share": (sum(row["trainable"] for row in reviewed), len(reviewed)),
        "cut_share": (sum((row["cut"] or 0) > 0 for row in ok), len(reviewed)),
        **{
            f"missing_{word}_share": (
                sum(area(row, REGION_LABELS[word]) == 0 for row in parsed),
                len(parsed),
            )
            for word in REGION_WORDS
        },
    }


def check_drift(drift: Row, shards: dict[str, list[Row]]) -> None:
    """Middles, and which shards are flagged and how far away, by the rule that drift.py states."""
    everything = written(row for part in shards.values() for row in part)
    series: dict[str, tuple[dict[str, float], dict[str, int], float | None]] = {}
    for name in rates([]):
        parts = {shard: rates(rows)[name] for shard, rows in shards.items()}
        shares = {shard: some / whole for shard, (some, whole) in parts.items() if whole}
        series[name] = shares, {shard: whole for shard, (_, whole) in parts.items()}, None
    for metric in (*METRICS, *CLAIMS):
        if not (numbers := values(everything, metric)):
            continue
        by_shard = {shard: values(written(rows), metric) for shard, rows in shards.items()}
        middle = statistics.fmean if metric in WHOLE else statistics.median
        lower, _, upper = (
            statistics.quantiles(numbers, n=4, method="inclusive")
            if len(numbers) > 1
            else (0, 0, 0)
        )
        scale = statistics.pstdev(numbers) if metric in WHOLE else upper - lower
        some = {shard: middle(part) for shard, part in by_shard.items() if part}
        series[metric] = some, {shard: len(part) for shard, part in by_shard.items()}, scale
    assert sorted(drift) == sorted(series)
    for name, (own, counts, scale) in series.items():
        if not own:
            assert drift[name] == {"middle": None, "flagged": []}
            continue
        centre = statistics.median(own.values())
        assert drift[name]["middle"] == round(centre, 6)
        expected = {}
        for shard, number in own.items():
            away = _units(number, centre, list(own.values()), counts[shard], scale)
            if abs(away) > 5 and counts[shard] >= 50:
                expected[shard] = (round(number, 6), counts[shard], away)
        assert {
            flag["shard"]: (flag["value"], flag["count"]) for flag in drift[name]["flagged"]
        } == {shard: (number, count) for shard, (number, count, _) in expected.items()}
        for flag in drift[name]["flagged"]:
            away = expected[flag["shard"]][2]
            assert flag["away"] is None if math.isinf(away) else abs(flag["away"] - away) <= 0.006


def _units(
    number: float, centre: float, every: list[float], count: int, scale: float | None
) -> float:
    robust = 1.4826 * statistics.median(abs(other - centre) for other in every)
    least = 0.02 if scale is None else scale / 20
    chance = (math.sqrt(centre * (1 - centre)) if scale is None else scale) / math.sqrt(count)
    unit = max(robust, least, chance)
    apart = number - centre
    return 0.0 if apart == 0 else apart / unit if unit else math.copysign(math.inf, apart)
