"""A run of the data set pipeline: plan, pending shards, execution, global pass."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, ShardError
from configs.load import to_yaml
from configs.schema import DatasetConfig
from pipelines.chain import Chain, build_chain
from pipelines.dataset_job import DatasetJob, chain_reference
from pipelines.dedup.global_pass import is_global_pass_current, run_global_pass
from pipelines.ledger import Ledger, read_ledger
from pipelines.planning.missing import Loss, check_sources, reason_text
from pipelines.planning.plan import Plan, ShardTask, make_plan, pending, planned_inputs, write_plan
from pipelines.sources import STAGE, build_source
from stages.backends.weights import WEIGHTS, Weights
from stages.base import Stage
from stages.executors import executor_named
from stages.executors.job import Advance
from stages.record import Status
from stages.storage import layout
from stages.storage.commit import ChainInfo, complete_commits, complete_killed_commits
from stages.storage.lock import RunLock
from stages.storage.manifest import Manifest
from stages.storage.reader import DatasetReader
from stages.storage.repair import Damage, find_damage
from stages.storage.sidecar import Row, sidecar_columns
from stages.storage.store import Store

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Job:
    """A planned run: its stages, its plan, and a task for each pending shard.

    damage: what it will repair. samples_before: shard → what `DatasetReader.sampled_rows` said of
    it, for damaged shards. failed_before: shard → reason → number, of manifests.
    """

    config: DatasetConfig
    store: Store
    stages: list[Stage]
    plan: Plan
    tasks: list[ShardTask]
    chain: Chain = build_chain
    damage: list[Damage] = field(default_factory=list)
    samples_before: dict[int, dict[str, Row]] = field(default_factory=dict)
    failed_before: dict[int, Mapping[str, int]] = field(default_factory=dict)

    @property
    def pending_inputs(self) -> int:
        """The number of inputs in the pending shards."""
        return sum(task.shard.inputs for task in self.tasks)

    def lost(self) -> list[Loss]:
        """Returns the samples that a repair could not make again, once the job is executed.

        Where a sidecar was damaged too, nothing says which inputs had a sample. Then these are all
        inputs of its shard that can't be read or decoded for a reason that became more frequent.
        """
        columns = ("key", "source", "status", "reason", "detail", "stage")
        reader, lost = DatasetReader(self.store), list[Loss]()
        for index, before in sorted(self.samples_before.items()):
            rows = reader.rows(index, columns).to_pylist()
            # inputs of only zeros are copies of each other, which the source drops
            rows = [r for r in rows if r["stage"] == STAGE or r["status"] == Status.FAILED]
            former = [row for row in rows if row["key"] in before]
            gone = former if before else self._failed(rows, index)
            lost += [Loss(r["source"], reason_text(r["reason"], r["detail"])) for r in gone]
        return lost

    def _failed(self, rows: Sequence[Row], index: int) -> list[Row]:
        """Returns the rows that failed while they were read or decoded, for a reason that more
        inputs of the shard have than before.
        """
        first = {STAGE, *(stage.name for stage in self.stages if "image" in stage.provides)}
        failed = [r for r in rows if r["status"] == Status.FAILED and r["stage"] in first]
        now, before = Counter(row["reason"] for row in failed), self.failed_before.get(index, {})
        return [row for row in failed if now[row["reason"]] > before.get(row["reason"], 0)]

    def why(self) -> list[str]:
        """Returns a line for each kind of task, such as "3 shards through caption, from their own
        samples".
        """
        kinds = Counter(map(self._why, self.tasks))
        return [
            f"{count} shard{'s' if count > 1 else ''} {why}" for why, count in sorted(kinds.items())
        ]

    def _why(self, task: ShardTask) -> str:
        damaged = "with damaged files: their intact samples are kept, the rest is made again"
        if not task.exists:
            return damaged if task.damaged else "from the source"
        reasons = [damaged] if task.damaged else []
        if task.stale_stages:
            stale = [stage.name for stage in self.stages if stage.name in task.stale_stages]
            reasons.append(f"through {', '.join(stale)}, from their own samples")
        if task.inputs_changed:
            reasons.append("with inputs that may have changed: those are processed again")
        if task.retry:
            reasons.append(f"with inputs to retry ({', '.join(sorted(task.retry))})")
        return "; ".join(reasons)


def plan_job(
    config: DatasetConfig,
    retry: frozenset[str] = frozenset(),
    chain: Chain = build_chain,
    *,
    repair: bool = False,
    advance: Advance = lambda count: None,
) -> Job:
    """Checks the configuration, lists the source and finds the pending shards. Writes nothing,
    except that commits of a killed run are completed.

    retry: reasons; inputs that were dropped or failed with one of them are processed again.
    repair: read all files, and plan to make damaged ones again; else missing and truncated files
    are an error. advance: called with the number of bytes read for that. Raises ConfigError,
    SourceError, ShardError or WeightsError.
    """
    store = Store(config.output)
    _check_output(config, store)
    stages = chain(config)
    annotations = ChainInfo.of(stages, signed=()).annotations
    sidecar_columns(annotations)  # fails for two columns of one name
    complete_killed_commits(store)
    if repair and not store.names(layout.SHARDS):
        raise ConfigError(f"output={store.url} has no shards, so there is nothing to repair.")
    damage = find_damage(store, advance) if repair else []
    if not repair:
        DatasetReader(store).check_sizes()
    plan = make_plan(config, store, repair=repair)
    damaged = {each.shard for each in damage}
    tasks = pending(plan, store, stages, retry, damaged)
    if config.source.missing == "stop":
        whole = [task for task in tasks if not task.damaged]
        check_sources(plan, whole, store, build_source(config))
    planned = {shard.index for shard in plan.shards} & damaged
    reader = DatasetReader(store)
    samples = {index: reader.sampled_rows(index) for index in planned}
    manifests = reader.manifests(readable_only=True) if planned else {}
    failed = {index: manifests[index].failed for index in planned & {*manifests}}
    return Job(config, store, stages, plan, tasks, chain, damage, samples, failed)


def _check_output(config: DatasetConfig, store: Store) -> None:
    """Raises ConfigError if the output holds files, but no data set, or if one of source and output
    is inside the other.
    """
    names = {*store.names("")} - {layout.LOCK}
    if names and not names & {layout.PLAN, layout.DATASET}:
        raise ConfigError(
            f"output={store.url} holds {min(names)!r}, and no data set. Give a new or an empty "
            "folder: a run would overwrite files such as README.md."
        )
    folder = Path(config.source.path)
    if store.local and config.source.path and folder.is_dir():
        source, output = folder.resolve(), Path(store.path("")).resolve()
        if source.is_relative_to(output) or output.is_relative_to(source):
            raise ConfigError(
                f"source.path={config.source.path} and output={store.url}: one is inside the "
                "other. Give folders of which neither contains the other."
            )


def fetch_weights(config: DatasetConfig, chain: Chain = build_chain) -> list[dict[str, str]]:
    """Fetches and checks all weights files of the chain. Returns name, file, sha256 and license of
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


def execute(job: Job, advance: Advance) -> Iterator[Manifest]:
    """Processes the pending shards and yields the manifest of each when it is committed. Then runs
    the global pass.

    If it is stopped, the same call continues. advance: called with the number of processed records.
    """
    store, config = job.store, job.config
    if is_current(job):
        return
    chain = ChainInfo.of(job.stages)
    with RunLock(store):
        _preflight(job)
        complete_commits(store)
        _remove_unreadable(store, job.damage)
        write_plan(job.plan, store)
        store.write_if_changed(layout.CONFIG, to_yaml(config))
        info = json.dumps(_dataset_info(job, chain), indent=1, ensure_ascii=False)
        store.write_if_changed(layout.DATASET, info + "\n")
        if job.tasks:
            reference = chain_reference(config, job.chain)
            dataset_job = DatasetJob(config=config, chain=reference, info=chain)
            run_tasks = executor_named(config.executor)
            yield from run_tasks(dataset_job, job.tasks, advance)
            for folder in (layout.SHARDS, layout.STAGED):
                store.sweep(folder)  # a worker may have been killed while it wrote
        run_global_pass(store, config.global_pass, chain)


def _preflight(job: Job) -> None:
    """Lets each stage that a record may need check what it depends on. Raises PipelineError."""
    for stage in job.stages:
        if any(task.may_need(stage.name) for task in job.tasks):
            stage.preflight()


def _remove_unreadable(store: Store, damage: Sequence[Damage]) -> None:
    """Removes manifests and tables that can't be read; the run makes them again."""
    readable = DatasetReader(store).manifests(readable_only=True)
    for each in damage:
        is_manifest = layout.is_manifest(each.name.rpartition("/")[2])
        if each.shard < 0 or (is_manifest and each.shard not in readable):
            store.remove(each.name)


def is_current(job: Job) -> bool:
    """Returns whether the output is complete, so that the run has nothing to do. Raises ShardError
    for a damaged plan or duplicates.parquet.
    """
    store = job.store
    is_pending = bool(job.tasks or job.damage)
    if is_pending or len(planned_inputs(store) or ()) != len(job.plan.shards):
        return False
    reader = DatasetReader(store)
    try:
        info = reader.dataset_info()
    except ShardError:
        return False  # it is damaged, and written again
    # A run with other settings may have been killed after it stored them.
    return (
        reader.config_text() == to_yaml(job.config)
        and info.get("signatures") == [*ChainInfo.of(job.stages).signatures]
        and info.get("passed_over", []) == job.plan.passed_over.to_json()
        and is_global_pass_current(store, job.config.global_pass)
    )


def _dataset_info(job: Job, chain: ChainInfo) -> dict[str, Any]:
    """Returns the contents of dataset.json."""
    path = job.config.source.path
    return {
        "version": layout.FORMAT_VERSION,
        "source": path if "://" in path else str(Path(path).resolve()),
        "stages": [stage.name for stage in job.stages],
        "signatures": list(chain.signatures),
        "backends": {
            stage.name: stage.config.backend
            for stage in job.stages
            if hasattr(stage.config, "backend")
        },
        "weights": fetch_weights(job.config, job.chain),
        "passed_over": job.plan.passed_over.to_json(),
    }


def throughput(manifests: Sequence[Manifest]) -> float:
    """Returns images per second between the first and the last commit, which leaves out start-up
    and the loading of models. Returns 0.0 for fewer than two shards; it is inexact for few.
    """
    if len(manifests) < 2:
        return 0.0
    first, *rest = sorted(manifests, key=lambda manifest: manifest.run.finished)
    seconds = rest[-1].run.finished - first.run.finished
    return float(sum(manifest.inputs for manifest in rest) / max(seconds, 1e-9))


def run(
    config: DatasetConfig, advance: Advance = lambda count: None, chain: Chain = build_chain
) -> Ledger:
    """Plans and executes a run without a progress bar, for tests and notebooks. Returns the data
    set's ledger.
    """
    job = plan_job(config, chain=chain)
    started = time.time()
    manifests = list(execute(job, advance))
    logger.info("%d shards in %.1f s", len(manifests), time.time() - started)
    return read_ledger(job.store)
