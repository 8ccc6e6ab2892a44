"""One run of the data set pipeline: plan, what is pending, execute, ledger, report."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from configs.errors import ShardError
from configs.load import to_yaml
from configs.schema import DatasetConfig
from pipelines.chain import Chain, build_chain
from pipelines.dedup.global_pass import (
    is_global_pass_current,
    lint_identities,
    run_global_pass,
    stale_shards,
)
from pipelines.planning.plan import Plan, ShardTask, make_plan, pending, planned_shards, write_plan
from pipelines.takedown import lint_takedowns
from stages.backends.weights import WEIGHTS, Weights
from stages.base import Stage
from stages.executors import EXECUTORS, Advance
from stages.record import SCHEMA_VERSION
from stages.storage.commit import (
    FOLDER,
    is_quarantined,
    manifests,
    read_manifests,
    read_sample,
    read_sidecar,
)
from stages.storage.lock import RunLock
from stages.storage.store import Store

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Ledger:
    """inputs = written + dropped (by reason) + failed (by reason), per shard and in all."""

    shards: int = 0
    inputs: int = 0
    written: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, manifest: dict[str, Any]) -> None:
        """Raises ShardError for a manifest that doesn't balance."""
        dropped, failed = Counter(manifest["dropped"]), Counter(manifest["failed"])
        if manifest["inputs"] != manifest["written"] + dropped.total() + failed.total():
            raise ShardError(
                f"{manifest['shard']}: {manifest['inputs']} inputs, but its ledger doesn't add "
                "up to that"
            )
        self.shards += 1
        self.inputs += manifest["inputs"]
        self.written += manifest["written"]
        self.dropped += dropped
        self.failed += failed

    def lines(self) -> list[str]:
        lines = [f"{self.inputs:>8,} inputs in {self.shards} shards", f"{self.written:>8,} written"]
        for word, reasons in (("dropped", self.dropped), ("failed", self.failed)):
            why = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
            lines.append(f"{reasons.total():>8,} {word}" + (f" ({why})" if why else ""))
        return lines


def read_ledger(store: Store) -> Ledger:
    """The ledger of every committed shard."""
    ledger = Ledger()
    for manifest in manifests(store):
        ledger.add(manifest)
    return ledger


@dataclass(slots=True)
class Job:
    """A planned run: what there is, what is still to do, and why."""

    config: DatasetConfig
    store: Store
    stages: list[Stage]
    plan: Plan
    tasks: list[ShardTask]
    chain: Chain = build_chain

    @property
    def pending_inputs(self) -> int:
        return sum(task.shard.inputs for task in self.tasks)

    def why(self) -> list[str]:
        """One line for each kind of work, e.g. "3 shards from caption on, from their own samples"."""
        return [
            f"{count} shards {why}"
            for why, count in sorted(Counter(map(self._why, self.tasks)).items())
        ]

    def _why(self, task: ShardTask) -> str:
        if not task.exists:
            return "from the source"
        reasons = []
        if task.again:
            stale = [stage.name for stage in self.stages if stage.name in task.again]
            reasons.append(f"through {', '.join(stale)}, from their own samples")
        if task.moved:
            reasons.append("with inputs that may have changed: those that have are made again")
        if task.retry:
            reasons.append(f"with inputs to be tried again ({', '.join(sorted(task.retry))})")
        return "; ".join(reasons)


def plan_job(
    config: DatasetConfig, retry: frozenset[str] = frozenset(), chain: Chain = build_chain
) -> Job:
    """Everything up to the first picture: checks the configuration, lists the source, finds the
    pending shards.

    retry: reasons; inputs that ended with one of them are tried again. Writes nothing. Raises
    SourceError, ShardError or WeightsError.
    """
    store = Store(config.output)
    stages = chain(config)
    plan = make_plan(config, store)
    tasks = pending(plan, store, stages, retry)
    return Job(config, store, stages, plan, tasks, chain)


def fetch_weights(config: DatasetConfig, chain: Chain = build_chain) -> list[dict[str, str]]:
    """Fetch and check every weights file of the chain; returns name, file, digest and licence of
    each.
    """
    weights = Weights(config.weights)
    names = sorted({name for stage in chain(config) for name in stage.weights()})
    for name in names:
        weights.fetch(name)
    return [
        {
            "name": n,
            "file": WEIGHTS[n].file,
            "sha256": WEIGHTS[n].sha256,
            "license": WEIGHTS[n].license,
        }
        for n in names
    ]


def execute(job: Job, advance: Advance) -> Iterator[dict[str, Any]]:
    """Make the pending shards; yields each manifest as it is committed. Stopped at any point, the
    same call resumes.
    """
    store, config = job.store, job.config
    planned = planned_shards(store) == len(job.plan.shards)
    if not job.tasks and planned and is_global_pass_current(store, config.global_pass):
        return
    with RunLock(store):
        store.sweep(FOLDER)
        write_plan(job.plan, store)
        store.write_if_changed("config.yaml", to_yaml(config))
        store.write_if_changed(
            "dataset.json", json.dumps(_card(job), indent=1, ensure_ascii=False) + "\n"
        )
        if job.tasks:
            yield from EXECUTORS[config.executor](config, job.tasks, advance, job.chain)
        run_global_pass(store, config.global_pass)


def _card(job: Job) -> dict[str, Any]:
    path = job.config.source.path
    return {
        "schema": SCHEMA_VERSION,
        "source": path if "://" in path else str(Path(path).resolve()),
        "stages": [stage.name for stage in job.stages],
        "signatures": [stage.signature() for stage in job.stages],
        "backends": {s.name: s.config.backend for s in job.stages if hasattr(s.config, "backend")},
        "weights": fetch_weights(job.config, job.chain),
    }


def lint(store: Store) -> Iterator[str]:
    """Every contradiction between manifests, files, sidecars, samples, verdicts and identities, as
    a line for people; none means sound.
    """
    for manifest in stale_shards(store):
        yield f"{manifest['shard']}: copies or take-downs are known that it doesn't carry out yet. Run again."
    for index, manifest in read_manifests(store).items():
        name = manifest["shard"]
        sound = True
        for facts in manifest["files"].values():
            try:
                with store.open(f"{FOLDER}/{facts['name']}") as stream:
                    digest, count = (
                        hashlib.file_digest(cast(Any, stream), "sha256").hexdigest(),
                        stream.tell(),
                    )
            except FileNotFoundError:
                yield f"{name}: {facts['name']} is missing"
                sound = False
                continue
            if digest != facts["sha256"]:
                yield f"{name}: {facts['name']} is not the file that was committed ({count:,} bytes)"
                sound = False
        if sound:
            yield from _lint_samples(store, index, manifest)
    yield from lint_takedowns(store)
    yield from lint_identities(store)


def _lint_samples(store: Store, index: int, manifest: dict[str, Any]) -> Iterator[str]:
    rows = read_sidecar(store, index).to_pylist()
    if len(rows) != manifest["inputs"]:
        yield f"{manifest['shard']}: {len(rows)} rows for {manifest['inputs']} inputs"
    for kind, chosen in (
        ("tar", [r for r in rows if r["status"] == "ok"]),
        ("held", [r for r in rows if is_quarantined(r)]),
    ):
        if not chosen:
            continue
        if kind not in manifest["files"]:
            yield f"{manifest['shard']}: {len(chosen)} rows point into a tar that its manifest doesn't name"
            continue
        with store.open(f"{FOLDER}/{manifest['files'][kind]['name']}") as tar:
            for row in chosen:
                try:
                    record = read_sample(tar, row)
                except ShardError as error:
                    yield f"{manifest['shard']}: {error}"
                    continue
                if any(
                    getattr(record, name) != row[name]
                    for name in ("source", "sha256", "caption", "license")
                ):
                    yield f"{manifest['shard']}: sample {row['key']} contradicts its row"


def throughput(done: Sequence[dict[str, Any]]) -> float:
    """Images per second from the first shard's commit to the last's: start-up and the loading of
    models left out.

    To be quoted for many shards only. 0.0 where fewer than two were made.
    """
    if len(done) < 2:
        return 0.0
    ordered = sorted(done, key=lambda manifest: manifest["run"]["finished"])
    span = ordered[-1]["run"]["finished"] - ordered[0]["run"]["finished"]
    return float(sum(m["inputs"] for m in ordered[1:]) / max(span, 1e-9))


def run(config: DatasetConfig, advance: Advance = lambda count: None) -> Ledger:
    """Plan and execute without a screen: the whole pipeline as one call, for tests and notebooks."""
    job = plan_job(config)
    started = time.time()
    done = list(execute(job, advance))
    logger.info("%d shards in %.1f s", len(done), time.time() - started)
    return read_ledger(job.store)
