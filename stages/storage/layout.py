"""Layout: every file name of a data set under OUT. No other module spells one out.

OUT/dataset.json  config.yaml  plan.parquet  duplicates.parquet  identities.parquet
OUT/takedown.jsonl  run.lock  README.md  croissant.json
OUT/shards/fgid-000000.tar             samples
OUT/shards/fgid-000000.quarantine.tar  complete samples that a rule or an exclusion dropped
OUT/shards/fgid-000000.parquet         the sidecar: a row for every input
OUT/shards/fgid-000000.json            the manifest, written last
OUT/report/index.html  stats.json  stats.parquet
"""

from __future__ import annotations

from typing import Final

from configs.errors import ShardError

FORMAT_VERSION: Final = 3
"""Of tars, sidecars and manifests. It rises only for a change that older programs can't read."""
READABLE: Final = (2, 3)
"""Versions that this program reads."""

DATASET: Final = "dataset.json"
CONFIG: Final = "config.yaml"
PLAN: Final = "plan.parquet"
DUPLICATES: Final = "duplicates.parquet"
IDENTITIES: Final = "identities.parquet"
TAKEDOWNS: Final = "takedown.jsonl"
LOCK: Final = "run.lock"
README: Final = "README.md"
CROISSANT: Final = "croissant.json"
REPORT: Final = "report/index.html"
STATS: Final = "report/stats.json"
STATS_TABLE: Final = "report/stats.parquet"

SHARDS: Final = "shards"
TARS: Final = "fgid-??????.tar"  # six characters: no quarantine tars among them
SIDECARS: Final = "fgid-??????.parquet"
_PREFIX: Final = "fgid-"


def shard_name(index: int) -> str:
    return f"{_PREFIX}{index:06d}"


def shard_index(name: str) -> int:
    """The inverse of `shard_name`. Raises ShardError for another name."""
    number = name.removeprefix(_PREFIX)
    if not name.startswith(_PREFIX) or not number.isdecimal():
        raise ShardError(f"{name!r} is not a shard's name, such as {shard_name(12)}")
    return int(number)


def tar(index: int) -> str:
    return f"{shard_name(index)}.tar"


def quarantine_tar(index: int) -> str:
    return f"{shard_name(index)}.quarantine.tar"


def sidecar(index: int) -> str:
    return f"{shard_name(index)}.parquet"


def manifest(index: int) -> str:
    return f"{shard_name(index)}.json"


def is_manifest(name: str) -> bool:
    """True of a manifest's file name."""
    return name.startswith(_PREFIX) and name.endswith(".json")


def in_shards(name: str) -> str:
    """The path of a shard's file, relative to OUT."""
    return f"{SHARDS}/{name}"
