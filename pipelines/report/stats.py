"""Stats: every figure of the report.

`data` follows from the sidecars alone, so anyone can recompute it and equal shards give equal figures. What varies from
run to run (seconds, images per second) stands apart under `runs`, and comes from the manifests. A ledger that doesn't
balance, or a manifest that its sidecar contradicts, is an error and never a number in a report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq

from configs.errors import ShardError
from pipelines.plan import PLAN
from pipelines.report.spread import rounded, spread
from pipelines.shards import manifests, read_sidecar
from pipelines.store import Store
from stages.record import Status
from stages.regions import LABEL_IDS, LABELS, REGION_LABELS

EXAMPLES = 5  # sources named for each reason

_COLUMNS = [
    *("source", "status", "reason", "detail", "stage", "tar_size"),
    *("width", "height", "faces", "face", "label_areas", "caption", "face_caption"),
]
_ENDED = (Status.DROPPED, Status.FAILED)

Row = Mapping[str, Any]


@dataclass(slots=True)
class _Written:
    """Columns of the written samples, in order; statistics are made of these once all shards are read."""

    scores: list[float] = field(default_factory=list)
    face_sides: list[float] = field(default_factory=list)
    face_counts: Counter[int] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    areas: list[Sequence[float]] = field(default_factory=list)
    captions: list[tuple[int, int]] = field(default_factory=list)  # words, characters
    face_captions: list[tuple[int, int]] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.face_counts[len(row["faces"])] += 1
        self.sizes[row["width"], row["height"]] += 1
        self.captions.append(_lengths(row["caption"]))
        self.face_captions.append(_lengths(row["face_caption"]))
        if row["label_areas"]:
            self.areas.append(row["label_areas"])
        if 0 <= row["face"] < len(row["faces"]):
            face = row["faces"][row["face"]]
            x1, y1, x2, y2 = face["box"]
            self.scores.append(face["score"])
            self.face_sides.append(min(x2 - x1, y2 - y1))


@dataclass(slots=True)
class _Ended:
    """How many records ended for one reason, and the first few of them."""

    count: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append({"source": row["source"], "detail": row["detail"]})


def compute_stats(store: Store) -> dict[str, Any]:
    """The report's figures, ready for JSON.

    data: from the sidecars alone. runs: times of each shard's last run. plan: shards and inputs that the kept plan
    holds, None without one. chains: the stage signatures that shards were made with, more than one while a changed
    configuration is not run to its end. Raises ShardError if there is no shard, or one contradicts itself.
    """
    found = list(manifests(store))
    if not found:
        raise ShardError(f"{store.url} holds no committed shard: there is nothing to report. Run the data set first.")
    written, ended, shards = _Written(), dict[tuple[str, str, str], _Ended](), []
    for manifest in found:
        rows = _rows(store, manifest)
        shards.append(_balanced(manifest, rows))
        for row in rows:
            if row["status"] == Status.OK:
                written.add(row)
            else:
                ended.setdefault((row["status"], row["stage"], row["reason"]), _Ended()).add(row)
    data = _ledger(shards, ended) | {"shards": shards} | _figures(written)
    return {"data": data, "runs": _runs(found), "plan": _plan(store), "chains": _chains(found)}


def _rows(store: Store, manifest: Row) -> list[Row]:
    try:
        rows: list[Row] = read_sidecar(store, int(manifest["shard"].rpartition("-")[2]), _COLUMNS).to_pylist()
    except FileNotFoundError as error:
        raise ShardError(
            f"{store.url}: {manifest['shard']} has a manifest and no sidecar. Remove the manifest and run again."
        ) from error
    return rows


def _balanced(manifest: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """The shard's row of the table. Raises ShardError unless rows and manifest agree and the ledger balances."""
    counts = Counter(row["status"] for row in rows)
    shard = {
        "shard": manifest["shard"],
        "inputs": len(rows),
        "written": counts.pop(Status.OK, 0),
        "dropped": counts.pop(Status.DROPPED, 0),
        "failed": counts.pop(Status.FAILED, 0),
        "tar_bytes": sum(row["tar_size"] for row in rows),
    }
    if counts:
        raise ShardError(f"{shard['shard']}: the sidecar has rows of status {', '.join(sorted(counts))}")
    stated = {name: manifest[name] for name in ("inputs", "written", "dropped", "failed")}
    by_reason = {s.value: dict(Counter(row["reason"] for row in rows if row["status"] == s)) for s in _ENDED}
    measured = {"inputs": shard["inputs"], "written": shard["written"], **by_reason}
    if stated != measured:
        raise ShardError(
            f"the ledger of {shard['shard']} doesn't balance: its manifest says {stated}, its sidecar {measured}. "
            "Remove the manifest and run again."
        )
    return shard


def _ledger(shards: Sequence[Row], ended: Mapping[tuple[str, str, str], _Ended]) -> dict[str, Any]:
    """inputs = written + dropped by reason + failed by reason. Raises ShardError if not."""
    inputs, written = (sum(shard[name] for shard in shards) for name in ("inputs", "written"))
    if inputs != written + sum(entry.count for entry in ended.values()):
        raise ShardError(f"the ledger doesn't balance: {inputs} inputs, {written} written, {len(ended)} reasons")
    by_reason: dict[str, Counter[str]] = {status.value: Counter() for status in _ENDED}
    by_stage: dict[str, Counter[str]] = {}
    for (status, stage, reason), entry in ended.items():
        by_reason[status][reason] += entry.count
        by_stage.setdefault(stage, Counter())[status] += entry.count
    reasons = sorted(ended.items(), key=lambda item: (item[0][0], -item[1].count, item[0]))
    return {
        "inputs": inputs,
        "written": written,
        **{status: dict(sorted(counts.items())) for status, counts in by_reason.items()},
        "by_stage": {
            stage: {status.value: counts[status] for status in _ENDED} for stage, counts in sorted(by_stage.items())
        },
        "reasons": [
            {"status": status, "stage": stage, "reason": reason, "count": entry.count, "examples": entry.examples}
            for (status, stage, reason), entry in reasons
        ],
    }


# ------------------------------------------------------------------------------------------ what was measured


def _figures(written: _Written) -> dict[str, Any]:
    """faces_per_image: of all found. detection_score, face_size (short side of the box, pixels): of the chosen one."""
    sizes = sorted(written.sizes.items(), key=lambda item: (-item[1], item[0]))
    return {
        "faces_per_image": {str(number): count for number, count in sorted(written.face_counts.items())},
        "detection_score": spread(written.scores),
        "face_size": spread(written.face_sides),
        "image_sizes": [{"width": width, "height": height, "count": count} for (width, height), count in sizes],
        "regions": {
            word: _area(written.areas, [LABEL_IDS[name] for name in names]) for word, names in REGION_LABELS.items()
        },
        "labels": {name: _area(written.areas, [LABEL_IDS[name]]) for name in LABELS},
        "caption": _texts(written.captions),
        "face_caption": _texts(written.face_captions),
    }


def _area(areas: Sequence[Sequence[float]], labels: Sequence[int]) -> dict[str, Any]:
    """Of some labels together: in how many pictures there is none, and their share of each picture that has any."""
    shares = [sum(row[label] for label in labels) for row in areas]
    present = [share for share in shares if share > 0]
    missing = len(shares) - len(present)
    return {
        "missing": missing,
        "missing_rate": rounded(missing / len(shares)) if shares else None,
        "area": spread(present),
    }


def _texts(lengths: Sequence[tuple[int, int]]) -> dict[str, Any]:
    words, characters = zip(*lengths, strict=True) if lengths else ((), ())
    return {"words": spread(words, whole=True), "characters": spread(characters, whole=True)}


def _lengths(text: str) -> tuple[int, int]:
    return len(text.split()), len(text)


# ------------------------------------------------------------------------------------------ what varies by run


def _runs(found: Sequence[Row]) -> dict[str, Any]:
    """seconds: in which at least one shard was being made; pauses between runs don't count.

    images_per_second: over those seconds. A shard's time begins once its models are loaded.
    """
    shards = []
    stage_seconds: dict[str, float] = {}
    for manifest in found:
        run = manifest["run"]
        shards.append(
            {
                "shard": manifest["shard"],
                "seconds": run["seconds"],
                "images_per_second": _rate(manifest["inputs"], run["seconds"]),
                "finished": run["finished"],
                "executor": run["executor"],
                "attempt": run["attempt"],
            }
        )
        for stage, seconds in run["stage_seconds"].items():
            stage_seconds[stage] = stage_seconds.get(stage, 0.0) + seconds
    total = sum(stage_seconds.values())
    return {
        "seconds": round(_busy_seconds(found), 3),
        "images_per_second": images_per_second(found),
        "finished": max(shard["finished"] for shard in shards),
        "stage_seconds": {stage: round(seconds, 3) for stage, seconds in stage_seconds.items()},
        "stage_share": {stage: round(seconds / total, 4) if total else 0.0 for stage, seconds in stage_seconds.items()},
        "shards": shards,
    }


def images_per_second(found: Sequence[Row]) -> float | None:
    """Of these shards' manifests, over the time in which at least one of them was being made."""
    return _rate(sum(manifest["inputs"] for manifest in found), _busy_seconds(found))


def _rate(images: int, seconds: float) -> float | None:
    return round(images / seconds, 3) if seconds > 0 else None


def _busy_seconds(found: Sequence[Row]) -> float:
    """In which at least one of these shards was being made."""
    runs = [manifest["run"] for manifest in found]
    total, reached = 0.0, float("-inf")
    for start, end in sorted((run["finished"] - run["seconds"], run["finished"]) for run in runs):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _plan(store: Store) -> dict[str, int] | None:
    if not store.exists(PLAN):
        return None
    with store.open(PLAN) as stream:
        column = pq.read_table(stream, columns=["shard"]).column("shard")
    return {"shards": len(column.unique()), "inputs": len(column)}


def _chains(found: Sequence[Row]) -> list[dict[str, Any]]:
    chains = Counter(tuple(manifest["signatures"]) for manifest in found)
    return [{"signatures": list(chain), "shards": count} for chain, count in sorted(chains.items())]
