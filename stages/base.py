"""The stage contract: one record in, one record out, in order.

A stage is one class with `setup` and `process`. It never removes, adds or reorders records: to drop
one it answers it with `status=dropped` and a reason. What a batch shares, the base owns: which
records are still ok, batching, errors, timing, and the check that the contract was kept. Stages are
retry-safe: `process` has no effect but its answer.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, ClassVar, Final

from configs.common import PlacementConfig, hashed_settings
from configs.errors import ConfigError
from stages.backends.registry import backend_class
from stages.backends.weights import Weights
from stages.fields import Annotation
from stages.record import Record, Status

# fields that every source gives
GIVEN = ("key", "source", "sha256", "license", "author", "consent", "image")
# Old name → current name, of stages that were renamed; data sets still hold the old ones.
RENAMED_STAGES: Final[Mapping[str, str]] = {"judge": "quality_filter", "neighbours": "global_pass"}
_CHUNK = 8  # records; codec remembers more decoded pictures than this
StageNames = frozenset[str]  # names of the stages that a record still needs
_ADDRESS = re.compile(r"0x[0-9a-f]{6,}")


@dataclass(frozen=True, slots=True)
class PendingRecord:
    """A record and the names of the stages it still needs."""

    record: Record
    remaining_stages: StageNames


class Rejection(Exception):  # noqa: N818 - the two below are verdicts on a record, not faults of the program
    """Ends one record with a reason (a snake_case name) and an optional detail for people."""

    status: ClassVar[Status]

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Dropped(Rejection):
    """The picture is fine, a rule says it is not wanted."""

    status = Status.DROPPED


class Failed(Rejection):
    """The picture itself can't be processed."""

    status = Status.FAILED


class Stage(ABC):
    """One link of the chain.

    name, version: part of the signature; raise `version` when the same input would give another
    answer. requires, provides: fields and annotations (by name) read and written; checked over the
    whole chain before anything starts. annotation: the class of the annotation it records.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    requires: ClassVar[tuple[str, ...]] = ()
    provides: ClassVar[tuple[str, ...]] = ()
    annotation: ClassVar[type[Annotation] | None] = None

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def resources(self) -> PlacementConfig:
        """CPUs and GPUs one copy holds while it lives, in fractions."""
        placement: PlacementConfig = self.config.placement
        return placement

    @property
    def batch_size(self) -> int:
        return self.resources.batch_size

    def setup(self) -> None:  # noqa: B027 - a stage without weights has nothing to set up
        """Load weights. Called once on the worker, before the first `process`; calling it again is
        harmless.
        """

    @abstractmethod
    def process(self, records: list[Record]) -> list[Record]:
        """Answer each of `records` (all ok, at most `batch_size`), in order."""

    def weights(self) -> tuple[str, ...]:
        """Names in the weights table this stage loads."""
        return ()

    def digests(self) -> Mapping[str, str]:
        """name → sha256 of every weights file the answers depend on."""
        return {}

    def take_counts(self) -> dict[str, int]:
        """What was counted since the last call, such as tokens; for the manifest of the shard that
        it was done for.
        """
        return {}

    def hashed_settings(self) -> dict[str, Any]:
        """The settings that the answers depend on, as the signature hashes them."""
        return hashed_settings(self.config) if is_dataclass(self.config) else {}

    def signature(self) -> str:
        """NAME-VERSION-HASH, the hash over the name that the stage was introduced with, version,
        settings and digests of the weights. Equal signatures mean equal answers."""
        name, weights = introduced_name(self.name), sorted(self.digests().items())
        text = json.dumps([name, self.version, self.hashed_settings(), weights], sort_keys=True)
        return f"{self.name}-{self.version}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


class RecordStage(Stage):
    """A stage for one record at a time: `process_one` returns it, or raises Dropped or Failed."""

    @abstractmethod
    def process_one(self, record: Record) -> Record: ...

    def process(self, records: list[Record]) -> list[Record]:
        return [self._guarded(record) for record in records]

    def _guarded(self, record: Record) -> Record:
        try:
            return self.process_one(record)
        except Rejection as verdict:
            return reject(record, verdict, self.name)


class BackendStage(Stage):
    """A stage around one backend of the registry, whose job is the stage's name. `setup` builds the
    backend from `backend_config`, which loads the model."""

    def __init__(self, config: Any, weights: Weights) -> None:
        super().__init__(config)
        self._weights = weights
        self._backend: Any = None

    @property
    def backend_config(self) -> Any:
        """The section of the configuration that the backend is built from."""
        return self.config

    @property
    def backend(self) -> Any:
        assert self._backend is not None, f"{self.name}: setup() comes before process()"
        return self._backend

    def setup(self) -> None:
        if self._backend is None:
            kind = backend_class(self.name, self.config.backend)
            self._backend = kind(self.backend_config, self._weights)

    def take_counts(self) -> dict[str, int]:
        counts: Counter[str] = getattr(self._backend, "counts", None) or Counter()
        taken = dict(counts)
        counts.clear()
        return taken

    def weights(self) -> tuple[str, ...]:
        name = getattr(self.config, "weights", "")
        return (name,) if name else ()

    def digests(self) -> Mapping[str, str]:
        return {name: self._weights.digest(name) for name in self.weights()}


def reject(record: Record, verdict: Rejection, stage: str) -> Record:
    """The record, dropped or failed in `stage`, without image, label map, identity and captions."""
    return replace(
        record,
        status=verdict.status,
        reason=verdict.reason,
        detail=_ADDRESS.sub("0x…", verdict.detail)[:300],  # addresses differ from run to run
        stage=stage,
        image=b"",
        parsing=b"",
        identity=None,
        caption="",
        face_caption="",
    )


def quarantine(record: Record, verdict: Rejection, stage: str) -> Record:
    """The record, dropped in `stage`, still complete: another rule may restore it."""
    return replace(
        record, status=verdict.status, reason=verdict.reason, detail=verdict.detail, stage=stage
    )


def current_stage(name: str) -> str:
    """The present name of a stage that a data set of any version names."""
    return RENAMED_STAGES.get(name, name)


def introduced_name(stage: str) -> str:
    """The name that a stage was introduced with; digests and signatures hash it."""
    return next((old for old, new in RENAMED_STAGES.items() if new == stage), stage)


def current_signature(signature: str) -> str:
    """A signature of any version, with its stage's current name: judge-1-HASH gives
    quality_filter-1-HASH.
    """
    name, version, digest = signature.rsplit("-", 2)
    return f"{current_stage(name)}-{version}-{digest}"


def take_counts(stages: Sequence[Stage]) -> dict[str, dict[str, int]]:
    """Stage → what it has counted since the last call, where it counts anything."""
    return {stage.name: counts for stage in stages if (counts := stage.take_counts())}


def run_stage(
    stage: Stage,
    records: Sequence[Record],
    seconds: dict[str, float] | None = None,
    remaining_stages: Sequence[StageNames] | None = None,
) -> list[Record]:
    """Run `stage` over the ok ones of `records`, keeping the others and the order; adds to
    `seconds[stage.name]`.

    The stage is set up if there is anything for it to do, outside its seconds. remaining_stages:
    for each record, the names of the stages it needs; None: all of them. Raises AssertionError
    where the stage broke the contract (another number, order or key of records).
    """
    answers = list(records)
    active = [
        i
        for i, record in enumerate(records)
        if record.ok and (remaining_stages is None or stage.name in remaining_stages[i])
    ]
    if active:
        stage.setup()
    started = time.perf_counter()
    for start in range(0, len(active), stage.batch_size):
        batch = active[start : start + stage.batch_size]
        given = [records[index] for index in batch]
        taken = stage.process(given)
        assert [r.key for r in taken] == [r.key for r in given], (
            f"stage {stage.name} must answer each record, in order"
        )
        for index, record in zip(batch, taken, strict=True):
            answers[index] = record
    if seconds is not None:
        seconds[stage.name] = seconds.get(stage.name, 0.0) + time.perf_counter() - started
    return answers


def run_chain(
    stages: Sequence[Stage],
    records: Sequence[Record],
    seconds: dict[str, float] | None = None,
    advance: Callable[[int], None] | None = None,
    remaining_stages: Sequence[StageNames] | None = None,
    entering: Callable[[str], None] | None = None,
) -> list[Record]:
    """Run all `stages` over `records`, some at a time, so that what a stage decoded the next still
    finds in memory.

    `advance` is told how many more are done, `entering` each stage's name before its next few
    records. Which records share a batch depends on `records` and `remaining_stages` alone.
    """
    chunk = chunk_size(stages)
    done: list[Record] = []
    for start in range(0, len(records), chunk):
        part = list(records[start : start + chunk])
        needs = None if remaining_stages is None else remaining_stages[start : start + chunk]
        for stage in stages:
            if entering is not None:
                entering(stage.name)
            part = run_stage(stage, part, seconds, needs)
        done += part
        if advance is not None:
            advance(len(part))
    return done


def chunk_size(stages: Sequence[Stage]) -> int:
    """How many records `run_chain` takes through all `stages` at a time."""
    return max(_CHUNK, *(stage.batch_size for stage in stages)) if stages else _CHUNK


def check_chain(stages: Sequence[Stage], given: tuple[str, ...] = GIVEN) -> None:
    """Raise ConfigError unless every stage's `requires` is provided by what comes before it."""
    have = set(given)
    for stage in stages:
        missing = [field for field in stage.requires if field not in have]
        if missing:
            raise ConfigError(
                f"stage {stage.name!r} requires {', '.join(missing)}, which no stage before it "
                "provides "
                "(before it: "
                f"{', '.join(s.name for s in stages[: stages.index(stage)]) or 'nothing'}). "
                "Put the stage that provides it earlier in `stages`."
            )
        have.update(stage.provides)
    for stage in stages:
        if stage.annotation is not None:
            assert stage.annotation.name in stage.provides, f"{stage.name} provides its annotation"
