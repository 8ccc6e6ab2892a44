"""Layout: all file names of a data set under OUT. Other modules use these names.

OUT/dataset.json  config.yaml  plan.parquet  duplicates.parquet  identities.parquet
OUT/takedown.jsonl  run.lock  README.md  croissant.json
OUT/shards/fgid-000000.tar             samples
OUT/shards/fgid-000000.quarantine.tar  complete samples that a rule or an exclusion dropped
OUT/shards/fgid-000000.parquet         the sidecar: a row for every input
OUT/shards/fgid-000000.json            the manifest, written last
OUT/staged/...                         new files of shards that are being replaced
OUT/features/KIND-DIGEST/...           features of the samples (train.features), laid out as OUT is:
                                       features.json, shards/fgid-000000.tar .parquet .json
OUT/report/index.html  stats.json  stats.parquet
"""

from __future__ import annotations

from typing import Final

from configs.errors import ShardError

# Of tars, sidecars and manifests. It rises only for a change that older programs can't read.
FORMAT_VERSION: Final = 3
READABLE: Final = (2, 3)  # versions that this program reads

DATASET: Final = "dataset.json"
CONFIG: Final = "config.yaml"
PLAN: Final = "plan.parquet"
DUPLICATES: Final = "duplicates.parquet"
IDENTITIES: Final = "identities.parquet"
TAKEDOWNS: Final = "takedown.jsonl"
LOCK: Final = "run.lock"
README: Final = "README.md"
CROISSANT: Final = "croissant.json"
REPORTS: Final = "report"
REPORT: Final = f"{REPORTS}/index.html"
STATS: Final = f"{REPORTS}/stats.json"
STATS_TABLE: Final = f"{REPORTS}/stats.parquet"

FEATURES: Final = "features"
FEATURES_INFO: Final = "features.json"  # in the folder of each kind
SHARDS: Final = "shards"
STAGED: Final = "staged"
TARS: Final = "fgid-??????.tar"  # a glob that doesn't match quarantine tars
SIDECARS: Final = "fgid-??????.parquet"
_PREFIX: Final = "fgid-"


def shard_name(index: int) -> str:
    """Returns the name of shard number `index`, such as fgid-000012."""
    return f"{_PREFIX}{index:06d}"


def shard_index(name: str) -> int:
    """Returns the number of the shard with this name. Raises ShardError for an invalid name."""
    number = name.removeprefix(_PREFIX)
    if not name.startswith(_PREFIX) or not number.isdecimal():
        raise ShardError(f"{name!r} is not a shard's name: expected a name like {shard_name(12)}")
    return int(number)


def tar(index: int) -> str:
    return f"{shard_name(index)}.tar"


def quarantine_tar(index: int) -> str:
    return f"{shard_name(index)}.quarantine.tar"


def quarantine_tar_version2(index: int) -> str:
    return f"{shard_name(index)}.held.tar"


def sidecar(index: int) -> str:
    return f"{shard_name(index)}.parquet"


def manifest(index: int) -> str:
    return f"{shard_name(index)}.json"


def index_of_sidecar(name: str) -> int | None:
    """Returns the number of the shard whose sidecar has this file name; None for other files."""
    return _index_of(name, ".parquet")


def index_of_manifest(name: str) -> int | None:
    """Returns the number of the shard whose manifest has this file name; None for other files."""
    return _index_of(name, ".json")


def _index_of(name: str, ending: str) -> int | None:
    return shard_index(name.removesuffix(ending)) if is_of_shard(name, ending) else None


def is_manifest(name: str) -> bool:
    """Returns whether this is the file name of a manifest."""
    return is_of_shard(name, ".json")


def is_of_shard(name: str, ending: str = "") -> bool:
    """Returns whether this is the file name of a shard's file. ending: which it must have; "": any.

    False for other names, such as "fgid-000012 (copy).json".
    """
    stem, _, rest = name.partition(".")
    number = stem.removeprefix(_PREFIX)
    is_shard = number.isdecimal() and stem == shard_name(int(number))
    return is_shard and f".{rest}" == (ending or f".{rest}")


def how_to_repair(name: str) -> str:
    """Returns what to do about a damaged or missing file of a data set. name: with or without its
    folder.
    """
    base = name.rpartition("/")[2]
    if base == TAKEDOWNS:
        return "Restore the file from a copy."
    if base in (CONFIG, DATASET):
        return "`run` with its preset writes it again."
    return (
        "Restore the file from a copy, or make it again: python -m pipelines.cli run -c "
        f"OUT/{CONFIG} output=OUT --repair"
    )


def in_shards(name: str) -> str:
    """Returns the path, relative to OUT, of a shard's file."""
    return f"{SHARDS}/{name}"


def in_staged(name: str) -> str:
    """Returns the path, relative to OUT, of a file that will replace one of a shard."""
    return f"{STAGED}/{name}"
