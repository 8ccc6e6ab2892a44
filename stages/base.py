"""The stage contract: a stage takes a list of records and returns a record for each, in order.

A stage is a class with `setup` and `process`. It never removes, adds or reorders records: to drop
one, it returns it with `status=dropped` and a reason. `run_stage` does what all stages share: it
skips records that are no longer ok, makes batches, measures times and checks the contract. Stages
are retry-safe: `process` has no effects besides its result.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Final

from configs.common import PlacementConfig, hashed_settings
from configs.errors import ConfigError
from stages.backends.registry import backend_class, check_backend
from stages.backends.weights import Weights, check_role
from stages.fields import Annotation, NotFiniteError
from stages.record import PROVENANCE, Record, Status

# fields that every source sets
SOURCE_FIELDS = ("key", "source", "sha256", *PROVENANCE, "image")
# Old name → current name of each renamed stage. Existing data sets contain the old names.
RENAMED_STAGES: Final[Mapping[str, str]] = {"judge": "quality_filter", "neighbours": "global_pass"}
_CHUNK = 8  # records; the codec's cache holds more decoded images than this
_RECORD_FIELDS: Final = {field.name for field in fields(Record)}
# names that an annotation can't have; the last two are keys of a sample's JSON
_RESERVED: Final = {*_RECORD_FIELDS, "version", "schema"}
StageNames = frozenset[str]
_ADDRESS = re.compile(r"0x[0-9a-f]{6,}")


@dataclass(frozen=True, slots=True)
class PendingRecord:
    """A record and the names of the stages that it still needs."""

    record: Record
    remaining_stages: StageNames


class Rejection(Exception):  # noqa: N818 - an expected outcome for a record, not a program error
    """Drops or fails one record, with a reason (a snake_case name) and an optional detail text."""

    status: ClassVar[Status]

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Dropped(Rejection):
    """The record was processed, and a rule excludes it."""

    status = Status.DROPPED


class Failed(Rejection):
    """The record can't be processed."""

    status = Status.FAILED


class Stage(ABC):
    """Base of all stages.

    name, version: parts of the signature. Raise `version` when the same input gives another result.
    requires, provides: names of the fields and annotations that the stage reads and writes; they
    are checked over the whole chain before it starts. annotation: the class of the annotation that
    the stage records.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    requires: ClassVar[tuple[str, ...]] = ()
    # a stage may set these two for itself, by its settings
    provides: tuple[str, ...] = ()
    annotation: type[Annotation] | None = None

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def resources(self) -> PlacementConfig:
        """CPUs, GPUs and batch size of one copy of the stage."""
        placement: PlacementConfig = self.config.placement
        return placement

    @property
    def batch_size(self) -> int:
        """The most records that `process` takes at a time."""
        return self.resources.batch_size

    def preflight(self) -> None:  # noqa: B027 - most stages need nothing but their weights
        """Checks what the stage needs besides its weights, such as a model server. It is called in
        the process that plans a run, before the first shard, if a record may need the stage. Raises
        PipelineError if the stage can't work.
        """

    def setup(self) -> None:  # noqa: B027 - a stage without weights has nothing to set up
        """Loads weights. It is called on the worker, before the first `process`; further calls have
        no effect.
        """

    @abstractmethod
    def process(self, records: list[Record]) -> list[Record]:
        """Returns the result for each of `records` (all ok, at most `batch_size`), in order."""

    def weights(self) -> tuple[str, ...]:
        """Returns the names, in the weights table, of the files that this stage loads."""
        return ()

    def digests(self) -> Mapping[str, str]:
        """Returns name → sha256 of every weights file that results depend on."""
        return {}

    def take_counts(self) -> dict[str, int]:
        """Returns what was counted since the last call, such as tokens, and resets the counts. The
        manifest of a shard states the counts of its records.
        """
        return {}

    def hashed_settings(self) -> dict[str, Any]:
        """Returns the settings that results depend on: those that the signature hashes."""
        return hashed_settings(self.config) if is_dataclass(self.config) else {}

    def signature(self) -> str:
        """Returns NAME-VERSION-HASH. Equal signatures mean equal results.

        The hash covers the name that the stage was introduced with, its version, its settings and
        the digests of its weights.
        """
        name, weights = introduced_name(self.name), sorted(self.digests().items())
        text = json.dumps([name, self.version, self.hashed_settings(), weights], sort_keys=True)
        return f"{self.name}-{self.version}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


class RecordStage(Stage):
    """A stage that processes one record at a time."""

    @abstractmethod
    def process_one(self, record: Record) -> Record:
        """Returns the result for an ok record, or raises Dropped or Failed."""

    def process(self, records: list[Record]) -> list[Record]:
        return [self._process_or_reject(record) for record in records]

    def _process_or_reject(self, record: Record) -> Record:
        try:
            return self.process_one(record)
        except Rejection as rejection:
            return reject(record, rejection, self.name)
        except NotFiniteError as error:
            return reject(record, Failed("not_a_number", str(error)), self.name)
        except Exception as error:
            error.add_note(f"stage {self.name}, input {record.source!r}")
            raise


class BackendStage(Stage):
    """A stage that calls a backend of the registry. `setup` builds the backend from
    `backend_config`, which loads the model.

    role: the stage that registry and weights table list the backend and its weights under; "": this
    stage. Raises ConfigError for an unknown backend, and for weights of another stage.
    """

    role: ClassVar[str] = ""

    def __init__(self, config: Any, weights: Weights) -> None:
        super().__init__(config)
        check_backend(self.role or self.name, config.backend)
        for name in self.weights():
            check_role(self.role or self.name, name)
        self._weights = weights
        self._backend: Any = None

    @property
    def backend_config(self) -> Any:
        """The part of the configuration that the backend is built from."""
        return self.config

    @property
    def backend(self) -> Any:
        """The backend. `setup` must have been called."""
        assert self._backend is not None, f"{self.name}: call setup() before process()"
        return self._backend

    def setup(self) -> None:
        if self._backend is None:
            kind = backend_class(self.role or self.name, self.config.backend)
            self._backend = kind(self.backend_config, self._weights)

    def take_counts(self) -> dict[str, int]:
        counter: Counter[str] = getattr(self._backend, "counts", None) or Counter()
        counts = dict(counter)
        counter.clear()
        return counts

    def weights(self) -> tuple[str, ...]:
        name = getattr(self.config, "weights", "")
        return (name,) if name else ()

    def digests(self) -> Mapping[str, str]:
        return {name: self._weights.digest(name) for name in self.weights()}


def reject(record: Record, rejection: Rejection, stage: str) -> Record:
    """Returns the record, dropped or failed in `stage`, without image, label map, embeddings and
    captions.
    """
    return replace(
        record,
        status=rejection.status,
        reason=rejection.reason,
        # memory addresses differ from run to run
        detail=_ADDRESS.sub("0x…", rejection.detail)[:300],
        stage=stage,
        image=b"",
        parsing=b"",
        identity=None,
        other_identities=None,
        caption="",
        face_caption="",
    )


def quarantine(record: Record, rejection: Rejection, stage: str) -> Record:
    """Returns the record, dropped in `stage` and still complete, so that changed rules can restore
    it.
    """
    return replace(
        record,
        status=rejection.status,
        reason=rejection.reason,
        detail=rejection.detail,
        stage=stage,
    )


def current_stage(name: str) -> str:
    """Returns the current name of a stage, from its current or its old name."""
    return RENAMED_STAGES.get(name, name)


def introduced_name(stage: str) -> str:
    """Returns the name that a stage was introduced with; digests and signatures hash it."""
    return next((old for old, new in RENAMED_STAGES.items() if new == stage), stage)


def current_signature(signature: str) -> str:
    """Returns a signature with its stage's current name: quality_filter-1-HASH of judge-1-HASH."""
    name, version, digest = signature.rsplit("-", 2)
    return f"{current_stage(name)}-{version}-{digest}"


def take_counts(stages: Sequence[Stage]) -> dict[str, dict[str, int]]:
    """Returns stage name → its counts since the last call, without stages that counted nothing."""
    return {stage.name: counts for stage in stages if (counts := stage.take_counts())}


def run_stage(
    stage: Stage,
    records: Sequence[Record],
    seconds: dict[str, float] | None = None,
    remaining_stages: Sequence[StageNames] | None = None,
) -> list[Record]:
    """Runs `stage` on those of `records` that are ok and need it. Returns all records, in order.

    seconds: the time spent is added to `seconds[stage.name]`, without that of `setup`, which is
    called if at least one record needs the stage. remaining_stages: for each record, the names of
    the stages that it needs; None: all. Raises AssertionError if the stage breaks the contract
    (returns another number, order or keys of records).
    """
    results = list(records)
    active = [
        i
        for i, record in enumerate(records)
        if record.ok and (remaining_stages is None or stage.name in remaining_stages[i])
    ]
    if active:
        stage.setup()
    started = time.perf_counter()
    for start in range(0, len(active), stage.batch_size):
        indices = active[start : start + stage.batch_size]
        batch = [records[index] for index in indices]
        processed = stage.process(batch)
        assert [r.key for r in processed] == [r.key for r in batch], (
            f"stage {stage.name} must return each record, in order"
        )
        for index, record in zip(indices, processed, strict=True):
            results[index] = record
    if seconds is not None:
        seconds[stage.name] = seconds.get(stage.name, 0.0) + time.perf_counter() - started
    return results


def run_chain(
    stages: Sequence[Stage],
    records: Sequence[Record],
    seconds: dict[str, float] | None = None,
    advance: Callable[[int], None] | None = None,
    remaining_stages: Sequence[StageNames] | None = None,
    entering: Callable[[str], None] | None = None,
) -> list[Record]:
    """Runs all `stages` on `records`, `chunk_size` records at a time, so that an image that one
    stage decoded is still in the codec's cache for the next. Returns all records, in order.

    advance: called with the number of records of each finished chunk. entering: called with a
    stage's name before the stage processes a chunk. seconds, remaining_stages: as in `run_stage`.
    Which records share a batch depends only on `records` and `remaining_stages`.
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
    """Returns how many records `run_chain` takes through all `stages` at a time."""
    return max(_CHUNK, *(stage.batch_size for stage in stages)) if stages else _CHUNK


def check_chain(stages: Sequence[Stage]) -> None:
    """Raises ConfigError if a stage requires what neither source nor an earlier stage provides, or
    if its `annotation` has a reserved name or doesn't agree with `provides`.
    """
    available = set(SOURCE_FIELDS)
    for index, stage in enumerate(stages):
        missing = [field for field in stage.requires if field not in available]
        if missing:
            providers = {"source": SOURCE_FIELDS} | {s.name: s.provides for s in stages[:index]}
            provided = [f"{n}: {', '.join(names)}" for n, names in providers.items() if names]
            raise ConfigError(
                f"stage {stage.name!r} requires {', '.join(missing)}, which no stage before it "
                "provides. Place it after the stage that provides it, or require fields of this "
                f"list: {'; '.join(provided)}."
            )
        available.update(stage.provides)
        if stage.annotation and stage.annotation.name in _RESERVED:
            raise ConfigError(
                f"stage {stage.name!r}: an annotation can't be called {stage.annotation.name}, "
                "since a sample's JSON has a value of this name. Give it another name."
            )
        annotations = {*stage.provides} - _RECORD_FIELDS
        expected = {stage.annotation.name} if stage.annotation else set()
        if annotations != expected:
            raise ConfigError(
                f"stage {stage.name!r} provides {', '.join(sorted(annotations)) or 'no annotation'}"
                f", but its `annotation` is {', '.join(expected) or 'not set'}. Give the name of "
                "the annotation in `provides` and its class in `annotation`."
            )
