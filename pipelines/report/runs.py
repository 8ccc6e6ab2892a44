"""What the report states of the runs: times from the manifests, the size of the plan, and the stage
signatures of the shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from stages.storage.layout import PLAN
from stages.storage.manifest import Manifest
from stages.storage.store import Store


def run_summary(manifests: Sequence[Manifest]) -> dict[str, Any]:
    """Times of each shard's last run, and of all together.

    seconds: time in which at least one shard was being made, without the pauses between runs; the
    time of a shard begins when its models are loaded. images_per_second: inputs over that time.
    """
    shards = []
    stage_seconds: dict[str, float] = {}
    for manifest in manifests:
        run = manifest.run
        shards.append(
            {
                "shard": manifest.shard,
                "seconds": run.seconds,
                "images_per_second": _rate(manifest.inputs, run.seconds),
                "finished": run.finished,
                "executor": run.executor,
                "attempt": run.attempt,
                "stage_seconds": dict(run.stage_seconds),
            }
        )
        for stage, seconds in run.stage_seconds.items():
            stage_seconds[stage] = stage_seconds.get(stage, 0.0) + seconds
    total = sum(stage_seconds.values())
    return {
        "seconds": round(_busy_seconds(manifests), 3),
        "images_per_second": images_per_second(manifests),
        "finished": max(manifest.run.finished for manifest in manifests),
        "stage_seconds": {stage: round(seconds, 3) for stage, seconds in stage_seconds.items()},
        "stage_share": {
            stage: round(seconds / total, 4) if total else 0.0
            for stage, seconds in stage_seconds.items()
        },
        "shards": shards,
    }


def images_per_second(manifests: Sequence[Manifest]) -> float | None:
    """Inputs of these shards over the time in which at least one of them was being made."""
    return _rate(sum(manifest.inputs for manifest in manifests), _busy_seconds(manifests))


def plan_summary(store: Store) -> dict[str, int] | None:
    """Number of shards and inputs in the plan; None without a plan."""
    if not store.exists(PLAN):
        return None
    column = store.table(PLAN, ["shard"]).column("shard")
    return {"shards": len(column.unique()), "inputs": len(column)}


def chain_summary(manifests: Sequence[Manifest]) -> list[dict[str, Any]]:
    """The different lists of stage signatures, and how many shards were made with each."""
    chains = Counter(manifest.signatures for manifest in manifests)
    return [{"signatures": list(chain), "shards": count} for chain, count in sorted(chains.items())]


def _rate(images: int, seconds: float) -> float | None:
    return round(images / seconds, 3) if seconds > 0 else None


def _busy_seconds(manifests: Sequence[Manifest]) -> float:
    """Time in which at least one of these shards was being made: the union of their intervals."""
    runs = [manifest.run for manifest in manifests]
    total, reached = 0.0, float("-inf")
    for start, end in sorted((run.finished - run.seconds, run.finished) for run in runs):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
