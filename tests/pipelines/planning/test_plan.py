"""Stale stages, and which shards are pending with which stages."""

from __future__ import annotations

import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from configs.schema import DatasetConfig, SourceConfig
from pipelines.planning.plan import Plan, ShardTask, make_plan, pending, stale_stages
from stages.base import Dropped, Failed, Stage, reject
from stages.record import Record, key_of
from stages.storage.commit import ChainInfo, PlannedShard, commit
from stages.storage.manifest import RunInfo
from stages.storage.store import Store
from tests.pipelines.planning.helpers import chain, sample, stub


def signatures(stages: list[Stage]) -> list[str]:
    return [stage.signature() for stage in stages]


def stale(now: list[Stage], before: list[Stage]) -> frozenset[str] | None:
    return stale_stages(now, signatures(now), signatures(before))


def test_no_stage_is_stale_without_a_change() -> None:
    assert stale(chain(), chain()) == frozenset()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("detect", {"detect", "quality_filter", "caption"}),
        ("quality_filter", {"quality_filter"}),
        ("caption", {"caption"}),
        ("measure", {"measure"}),
    ],
)
def test_stages_that_read_fields_of_a_changed_stage_are_stale(
    changed: str, expected: set[str]
) -> None:
    assert stale(chain(**{changed: 2}), chain()) == expected


def test_stages_that_read_fields_of_a_stale_stage_are_stale() -> None:
    def links(version: int) -> list[Stage]:
        return [
            stub("one", (), ("a",), version),
            stub("two", ("a",), ("b",)),
            stub("independent", ("image",), ("z",)),
            stub("three", ("b",), ("c",)),
            stub("four", ("c", "z"), ("d",)),
        ]

    assert stale(links(2), links(1)) == {"one", "two", "three", "four"}


def test_a_new_stage_and_the_stages_that_read_its_fields_are_stale() -> None:
    before = [stage for stage in chain() if stage.name != "detect"]
    assert stale(chain(), before) == {"detect", "quality_filter", "caption"}


def test_a_changed_stage_that_replaces_what_it_reads_needs_the_source() -> None:
    assert stale(chain(resize=2), chain()) is None


def test_a_stage_that_replaces_its_input_and_reads_a_stale_field_needs_the_source() -> None:
    def links(version: int) -> list[Stage]:
        return [stub("one", (), ("a",), version), stub("two", ("a", "image"), ("image",))]

    assert stale(links(2), links(1)) is None


def test_a_shard_with_a_stage_that_the_chain_no_longer_has_needs_the_source() -> None:
    assert stale([stage for stage in chain() if stage.name != "caption"], chain()) is None


def test_no_stage_is_stale_after_a_change_of_order() -> None:
    assert stale(chain(), chain()[::-1]) == frozenset()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def planned(index: int, inputs: int, digest: str = "") -> PlannedShard:
    return PlannedShard(index=index, inputs=inputs, bytes=0, digest=digest or f"inputs {index}")


def plan(*shards: PlannedShard) -> Plan:
    return Plan(file=tempfile.TemporaryFile(), shards=shards)


def committed(store: Store, index: int, records: list[Record], stages: list[Stage]) -> PlannedShard:
    shard = planned(index, len(records))
    commit(store, shard, records, ChainInfo.of(stages), RunInfo(finished=0.0, seconds=0.0))
    return shard


def test_only_a_stated_person_changes_the_digest_of_a_shard(tmp_path: Path) -> None:
    """Manifests of version 0.1 hold digests of key, size, version and exact copy."""
    (tmp_path / "Ada").mkdir()
    file = tmp_path / "Ada/1.jpg"
    file.write_bytes(b"x")

    def digest(**source: Any) -> str:
        config = DatasetConfig(source=SourceConfig(path=str(tmp_path), **source))
        [shard] = make_plan(config, Store(str(tmp_path / "out"))).shards
        return shard.digest

    line = f"{key_of('Ada/1.jpg')} 1 {file.stat().st_mtime_ns} "
    assert digest() == digest(license="CC0") == sha256(line.encode()).hexdigest()[:32]
    assert digest(person_folder=True) != digest()


def test_a_shard_without_a_manifest_is_pending_from_the_source(store: Store) -> None:
    complete = committed(store, 1, [sample("a")], chain())
    missing = planned(0, 3)
    assert pending(plan(missing, complete), store, chain()) == [ShardTask(shard=missing)]


def test_a_shard_is_pending_with_its_stale_stages(store: Store) -> None:
    old = committed(store, 0, [sample("a")], chain())
    committed(store, 1, [sample("b")], chain(caption=2))
    shards = plan(old, planned(1, 1))
    [task] = pending(shards, store, chain(caption=2))
    assert task == ShardTask(shard=old, exists=True, stale_stages=frozenset({"caption"}))


def test_a_shard_that_needs_the_source_is_pending_as_if_it_did_not_exist(store: Store) -> None:
    shard = committed(store, 0, [sample("a")], chain())
    assert pending(plan(shard), store, chain(resize=2)) == [ShardTask(shard=shard)]


def test_a_shard_with_changed_inputs_is_pending_without_stale_stages(
    store: Store,
) -> None:
    committed(store, 0, [sample("a")], chain())
    changed = planned(0, 1, "others")
    assert pending(plan(changed), store, chain()) == [
        ShardTask(shard=changed, exists=True, inputs_changed=True)
    ]


def test_retry_makes_shards_pending_that_have_records_with_the_reason(store: Store) -> None:
    failed = reject(sample("a"), Failed("truncated"), "resize")
    dropped = reject(sample("b"), Dropped("no_face"), "detect")
    shards = [
        committed(store, index, records, chain())
        for index, records in enumerate([[failed, dropped], [sample("c")], [dropped]])
    ]
    reasons = frozenset({"truncated", "timeout"})
    [task] = pending(plan(*shards), store, chain(), retry=reasons)
    assert task == ShardTask(shard=shards[0], exists=True, retry=frozenset({"truncated"}))
    tasks = pending(plan(*shards), store, chain(), retry=frozenset({"no_face"}))
    assert [(each.shard.index, each.retry) for each in tasks] == [
        (0, {"no_face"}),
        (2, {"no_face"}),
    ]


def test_a_shard_with_another_order_of_stages_is_pending_without_stale_stages(
    store: Store,
) -> None:
    shard = committed(store, 0, [sample("a")], chain()[::-1])
    assert pending(plan(shard), store, chain()) == [ShardTask(shard=shard, exists=True)]
