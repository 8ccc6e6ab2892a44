"""Manifest: describes a committed shard. A shard without a manifest doesn't exist.

What differs between equal runs (times, host, attempts) is in `run`, and nowhere else in a shard.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from configs.errors import ShardError
from stages.storage import layout, version2
from stages.storage.layout import FORMAT_VERSION, READABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file of a shard: its name in the shards folder, size in bytes, sha256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """The run that made a shard. finished: Unix time. seconds: from the start of the shard, with
    models loaded, to its commit.

    stage_seconds, stage_counts: by stage; the counts are what a stage counts, such as tokens.
    attempt: 1; more if workers died of the shard before.
    """

    finished: float
    seconds: float
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    stage_counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    executor: str = ""
    attempt: int = 1
    host: str = ""


@dataclass(frozen=True, slots=True)
class ShardRun:
    """A shard that is being processed. seconds, counts: by stage (see RunInfo). started: Unix
    time.
    """

    seconds: dict[str, float]
    executor: str
    started: float
    attempt: int = 1
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def finish(self) -> RunInfo:
        """Returns what the manifest records, with the present time as the end."""
        now = time.time()
        return RunInfo(
            finished=round(now, 3),
            seconds=round(now - self.started, 3),
            stage_seconds={stage: round(value, 4) for stage, value in self.seconds.items()},
            stage_counts=self.counts,
            executor=self.executor,
            attempt=self.attempt,
            host=platform.node(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A shard's numbers and files; inputs = written + dropped + failed.

    dropped, failed: reason → number of records. inputs_digest: equal digests mean equal inputs in
    equal order. signatures: of the stages that made the shard, in order. exclusions: digest of the
    applied exclusions; "": none. quarantine: None if nothing is quarantined.
    """

    shard: str
    inputs: int
    written: int
    dropped: Mapping[str, int]
    failed: Mapping[str, int]
    inputs_digest: str
    signatures: tuple[str, ...]
    exclusions: str
    tar: FileEntry
    quarantine: FileEntry | None
    sidecar: FileEntry
    run: RunInfo
    version: int = FORMAT_VERSION

    @property
    def index(self) -> int:
        """The shard's number."""
        return layout.shard_index(self.shard)

    @property
    def files(self) -> list[FileEntry]:
        """All files of the shard except the manifest."""
        files = (self.tar, self.quarantine, self.sidecar)
        return [entry for entry in files if entry is not None]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def from_json(data: bytes | str, name: str) -> Manifest:
        """Returns the manifest with this JSON. name: its file, for error messages. Raises
        ShardError if it is no manifest or has a version that this program can't read.
        """
        repair = layout.how_to_repair(name)
        try:
            values: dict[str, Any] = json.loads(data)
            version = values.get("version", values.get("schema"))
        except (ValueError, AttributeError) as error:
            raise ShardError(f"{name} is not a manifest: {error}. {repair}") from error
        if version not in READABLE:
            raise ShardError(
                f"{name} has format version {version}, this program reads "
                f"{', '.join(map(str, READABLE))}. Use another output, or the program version that "
                "wrote it."
            )
        try:
            return _manifest(version2.manifest(values) if version == 2 else values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ShardError(
                f"{name} is not a manifest: {type(error).__name__}: {error}. {repair}"
            ) from error


def _manifest(values: Mapping[str, Any]) -> Manifest:
    run = values["run"]
    return Manifest(
        version=values["version"],
        shard=str(values["shard"]),
        inputs=int(values["inputs"]),
        written=int(values["written"]),
        dropped={reason: int(count) for reason, count in values["dropped"].items()},
        failed={reason: int(count) for reason, count in values["failed"].items()},
        inputs_digest=str(values["inputs_digest"]),
        signatures=tuple(values["signatures"]),
        exclusions=str(values["exclusions"]),
        tar=_file(values["tar"]),
        quarantine=_file(values["quarantine"]) if values["quarantine"] else None,
        sidecar=_file(values["sidecar"]),
        run=RunInfo(
            **{entry.name: run[entry.name] for entry in fields(RunInfo) if entry.name in run}
        ),
    )


def _file(values: Mapping[str, Any]) -> FileEntry:
    name = str(values["name"])
    if "/" in name or name.startswith("."):
        raise ValueError(f"a shard's file can't be called {name!r}")
    return FileEntry(name=name, bytes=int(values["bytes"]), sha256=str(values["sha256"]))
