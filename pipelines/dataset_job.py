"""DatasetJob: lets an executor load, process and commit the shards of a data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name

from configs.load import load_text, to_yaml
from configs.schema import DatasetConfig
from pipelines.chain import Chain
from pipelines.planning.plan import ShardTask
from pipelines.planning.resume import load_shard
from stages.base import PendingRecord, Stage
from stages.executors.job import ChainReference, ExecutorSettings
from stages.record import Record
from stages.storage.commit import ChainInfo, commit
from stages.storage.manifest import Manifest, ShardRun
from stages.storage.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetJob:
    """A stages.executors.job.ShardJob for a data set. info: of the chain that the driver built, for
    the manifests.
    """

    config: DatasetConfig
    chain: ChainReference
    info: ChainInfo

    @property
    def settings(self) -> ExecutorSettings:
        return executor_settings(self.config)

    def load(self, task: ShardTask, stages: Sequence[Stage]) -> Iterator[PendingRecord]:
        return load_shard(self.config, Store(self.config.output), task, stages)

    def commit(self, task: ShardTask, records: Sequence[Record], run: ShardRun) -> Manifest:
        return commit(Store(self.config.output), task.shard, records, self.info, run.finish())


def executor_settings(config: DatasetConfig) -> ExecutorSettings:
    """Returns the part of the configuration that executors read."""
    return ExecutorSettings(threads=config.threads, stuck_after=config.stuck_after, ray=config.ray)


def chain_reference(config: DatasetConfig, chain: Chain) -> ChainReference:
    """Returns a reference from which workers build the chain. Its text is the name of the chain
    function on the first line, then the configuration as YAML.
    """
    name = f"{chain.__module__}:{chain.__qualname__}"
    return ChainReference("pipelines.dataset_job:build_from_text", f"{name}\n{to_yaml(config)}")


def build_from_text(text: str) -> list[Stage]:
    """Returns the stages of a chain, from the text that `chain_reference` makes."""
    name, _, config = text.partition("\n")
    chain: Chain = resolve_name(name)
    return chain(load_text(DatasetConfig, config))
