"""Runs: what the manifests say of time, and of the plan and the chains that shards were made by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.planning.plan import PLAN
from stages.storage.store import Store

Row = Mapping[str, Any]


def run_figures(found: Sequence[Row]) -> dict[str, Any]:
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
                "stage_seconds": run["stage_seconds"],
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
        "stage_share": {
            stage: round(seconds / total, 4) if total else 0.0
            for stage, seconds in stage_seconds.items()
        },
        "shards": shards,
    }


def images_per_second(found: Sequence[Row]) -> float | None:
    """Of these shards' manifests, over the time in which at least one of them was being made."""
    return _rate(sum(manifest["inputs"] for manifest in found), _busy_seconds(found))


def plan_figures(store: Store) -> dict[str, int] | None:
    """Shards and inputs that the kept plan holds, None without one."""
    if not store.exists(PLAN):
        return None
    column = store.table(PLAN, ["shard"]).column("shard")
    return {"shards": len(column.unique()), "inputs": len(column)}


def chain_figures(found: Sequence[Row]) -> list[dict[str, Any]]:
    """The stage signatures that shards were made with, and by how many."""
    chains = Counter(tuple(manifest["signatures"]) for manifest in found)
    return [{"signatures": list(chain), "shards": count} for chain, count in sorted(chains.items())]


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
