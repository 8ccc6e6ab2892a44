"""Which records a run reuses from an earlier one, and which stages each record still needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.errors import ShardError
from configs.schema import DatasetConfig, SourceConfig
from pipelines.planning.plan import Plan, ShardTask, make_plan, write_plan
from pipelines.planning.resume import PendingRecord, continued_record, load_shard
from stages.annotations import Answers, Measures
from stages.base import Dropped, Failed, Rejection, quarantine, reject
from stages.record import Record
from stages.storage.commit import ChainInfo, PlannedShard, commit
from stages.storage.exclusions import GLOBAL_PASS
from stages.storage.layout import TAKEDOWNS
from stages.storage.manifest import RunInfo
from stages.storage.store import Store
from tests.pipelines.planning.helpers import chain, sample, stub

NAMES = ("resize", "detect", "quality_filter", "caption", "measure")
ALL, NONE = frozenset(NAMES), frozenset[str]()


class Shard:
    """A shard of the files in a folder, and an output with the results of an earlier run."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.source, self.store = folder / "in", Store(str(folder / "out"))
        self.source.mkdir()
        for name in names:
            (self.source / name).write_bytes(name.encode())
        self.config = DatasetConfig(
            source=SourceConfig(path=str(self.source)), output=str(folder / "out")
        )
        self.plan = self.planned()

    def planned(self) -> Plan:
        plan = make_plan(self.config, self.store)
        write_plan(plan, self.store)
        return plan

    def read(self) -> dict[str, Record]:
        """Returns name → record, as read from the source."""
        loaded = load_shard(self.config, self.store, ShardTask(shard=self.plan.shards[0]), chain())
        return {each.record.source: each.record for each in loaded}

    def committed(self, *rejected: Record) -> None:
        """Commits these records, and a sample for each other input."""
        by_source = {record.source: record for record in rejected}
        records = [
            by_source.get(name) or replace(sample(name), sha256=record.sha256)
            for name, record in self.read().items()
        ]
        run = RunInfo(finished=0.0, seconds=0.0)
        commit(self.store, self.plan.shards[0], records, ChainInfo((), ()), run)

    def load(
        self, stale: Sequence[str] = (), inputs_changed: bool = False, retry: Sequence[str] = ()
    ) -> dict[str, PendingRecord]:
        task = ShardTask(
            shard=self.plan.shards[0],
            exists=True,
            stale_stages=frozenset(stale),
            inputs_changed=inputs_changed,
            retry=frozenset(retry),
        )
        loaded = list(load_shard(self.config, self.store, task, chain()))
        assert [each.record.key for each in loaded] == [item.key for item in self.plan.inputs_of(0)]
        return {each.record.source: each for each in loaded}


def remaining(loaded: dict[str, PendingRecord]) -> dict[str, frozenset[str]]:
    return {name: each.remaining_stages for name, each in loaded.items()}


def from_source(loaded: PendingRecord) -> bool:
    """Returns whether the record was read from the source, and not from the shard."""
    return loaded.record.image == loaded.record.source.encode() and loaded.record.identity is None


def test_all_inputs_of_an_uncommitted_shard_need_all_stages(tmp_path: Path) -> None:
    shard = Shard(tmp_path, "a.jpg", "b.jpg")
    task = ShardTask(shard=shard.plan.shards[0])
    loaded = list(load_shard(shard.config, shard.store, task, chain()))
    assert [each.remaining_stages for each in loaded] == [ALL, ALL]
    assert all(from_source(each) for each in loaded)


def test_samples_need_only_the_stale_stages_and_not_the_source(tmp_path: Path) -> None:
    shard = Shard(tmp_path, "a.jpg", "b.jpg")
    shard.committed()
    (shard.source / "a.jpg").unlink()
    loaded = shard.load(["caption"])
    assert remaining(loaded) == {"a.jpg": {"caption"}, "b.jpg": {"caption"}}
    assert not any(from_source(each) for each in loaded.values()), "no source file is read"


def test_a_reused_record_has_no_annotation_of_a_stage_that_it_still_needs() -> None:
    stages = chain()
    type(stages[NAMES.index("measure")]).annotation = Measures
    record = sample("a.jpg", annotations={"measures": {"sharpness": 0.5}, "another": {}})

    def annotations_with(stale: str) -> set[str]:
        shard = PlannedShard(index=0, inputs=1, bytes=0, digest="")
        task = ShardTask(shard=shard, exists=True, stale_stages=frozenset({stale}))
        pending = continued_record(record, task, stages)
        assert pending is not None
        return {*pending.record.annotations}

    assert annotations_with("caption") == {"measures", "another"}
    assert annotations_with("measure") == {"another"}


FAILED, NO_FACE = Failed("truncated", "at 5"), Dropped("no_face")


@pytest.mark.parametrize(
    ("rejection", "stage", "stale", "expected"),
    [
        (FAILED, "resize", ["caption"], NONE),
        (NO_FACE, "detect", ["quality_filter", "caption"], NONE),
        (NO_FACE, "detect", ["detect", "quality_filter", "caption"], ALL),
        (Failed("caption_failed"), "caption", ["detect"], ALL),
        (Failed("caption_failed"), "caption", ["measure"], NONE),
        (Failed("unreadable"), "source", ["detect"], NONE),
    ],
)
def test_a_dropped_or_failed_record_is_unchanged_unless_its_stage_or_an_earlier_one_is_stale(
    tmp_path: Path, rejection: Rejection, stage: str, stale: list[str], expected: frozenset[str]
) -> None:
    shard = Shard(tmp_path, "a.jpg", "b.jpg")
    shard.committed(reject(sample("a.jpg"), rejection, stage))
    loaded = shard.load(stale)
    assert remaining(loaded) == {"a.jpg": expected, "b.jpg": frozenset(stale)}
    assert from_source(loaded["a.jpg"]) == (expected == ALL)
    if expected == NONE:
        record = loaded["a.jpg"].record
        assert (record.status, record.reason, record.stage) == (
            rejection.status,
            rejection.reason,
            stage,
        )


@pytest.mark.parametrize(
    ("stale", "expected"),
    [
        (["measure"], None),
        (["caption"], None),
        (["quality_filter"], {"quality_filter", "caption", "measure"}),
        (["detect"], {"detect", "quality_filter", "caption", "measure"}),
    ],
)
def test_a_quarantined_record_is_restored_if_its_stage_or_an_earlier_one_is_stale(
    tmp_path: Path, stale: list[str], expected: set[str] | None
) -> None:
    shard = Shard(tmp_path, "a.jpg")
    shard.committed(
        quarantine(sample("a.jpg", caption=""), Dropped("blurred", "0.1"), "quality_filter")
    )
    loaded = shard.load(stale)["a.jpg"]
    assert not from_source(loaded)
    if expected is None:
        assert (loaded.record.reason, loaded.remaining_stages) == ("blurred", NONE)
    else:
        assert loaded.record.ok and loaded.record.detail == loaded.record.stage == ""
        assert loaded.remaining_stages == expected


def test_a_quarantined_duplicate_needs_the_stages_that_a_sample_needs(tmp_path: Path) -> None:
    shard = Shard(tmp_path, "a.jpg")
    duplicate = quarantine(sample("a.jpg"), Dropped("near_duplicate"), GLOBAL_PASS)
    shard.committed(duplicate)
    loaded = shard.load(["caption"])["a.jpg"]
    assert loaded.record.ok and loaded.remaining_stages == {"caption"}


def test_retry_reads_inputs_with_the_reason_from_the_source_and_no_others(tmp_path: Path) -> None:
    shard = Shard(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    shard.committed(
        reject(sample("a.jpg"), FAILED, "resize"), reject(sample("b.jpg"), NO_FACE, "detect")
    )
    loaded = shard.load(retry=["truncated"])
    assert remaining(loaded) == {"a.jpg": ALL, "b.jpg": NONE, "c.jpg": NONE}
    assert loaded["b.jpg"].record.reason == "no_face" and loaded["c.jpg"].record.ok


def test_of_changed_inputs_only_those_with_other_bytes_need_all_stages(tmp_path: Path) -> None:
    shard = Shard(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    shard.committed()
    (shard.source / "b.jpg").write_bytes(b"another")
    (shard.source / "c.jpg").unlink()
    shard.plan = shard.planned()
    loaded = shard.load(inputs_changed=True)
    assert remaining(loaded)["a.jpg"] == NONE and remaining(loaded)["b.jpg"] == ALL
    assert loaded["a.jpg"].record.identity is not None
    assert loaded["b.jpg"].record.image == b"another"
    assert loaded["c.jpg"].record.ok and remaining(loaded)["c.jpg"] == NONE, "it has vanished"


def test_where_only_the_provenance_differs_the_stages_that_read_it_run_again(
    tmp_path: Path,
) -> None:
    """`a` is a sample, `b` has no face, `c` was dropped for its licence."""
    shard = Shard(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    rights = stub("rights", ("license", "consent"))
    shard.committed(
        reject(replace(shard.read()["b.jpg"]), NO_FACE, "detect"),
        reject(replace(shard.read()["c.jpg"]), Dropped("license_not_allowed"), "rights"),
    )

    def load(**source: Any) -> dict[str, PendingRecord]:
        task = ShardTask(shard=shard.plan.shards[0], exists=True, inputs_changed=True)
        config = replace(shard.config, source=replace(shard.config.source, **source))
        loaded = load_shard(config, shard.store, task, [rights, *chain()])
        return {each.record.source: each for each in loaded}

    by_author = load(author="Ada")
    assert {each.record.author for each in by_author.values()} == {"Ada"}
    assert remaining(by_author) == dict.fromkeys(by_author, NONE), "no stage reads the author"
    assert by_author["a.jpg"].record.identity is not None
    assert [each.record.reason for each in by_author.values()] == [
        "",
        "no_face",
        "license_not_allowed",
    ]
    by_license = load(license="CC0")
    assert {each.record.license for each in by_license.values()} == {"CC0"}
    everything = ALL | {"rights"}
    assert remaining(by_license) == {"a.jpg": {"rights"}, "b.jpg": everything, "c.jpg": everything}
    assert from_source(by_license["c.jpg"])


def test_removed_inputs_are_recognised_by_key_and_by_digest(tmp_path: Path) -> None:
    shard = Shard(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    records = shard.read()
    shard.committed(reject(records["b.jpg"], FAILED, "resize"))
    entry = {
        "time": "",
        "by": "source",
        "note": "",
        "inputs": 1,
        "sha256": [records["a.jpg"].sha256, records["b.jpg"].sha256],
        "removed": {"fgid-000000": [records["a.jpg"].key]},
    }
    shard.store.write(TAKEDOWNS, json.dumps(entry) + "\n")
    task = ShardTask(shard=shard.plan.shards[0], exists=True, retry=frozenset({"truncated"}))
    first, second, third = load_shard(shard.config, shard.store, task, chain())
    for removed in (first, second):  # the second is read again and has a removed digest
        assert (removed.record.reason, removed.remaining_stages) == ("taken_down", NONE)
        assert removed.record.source == removed.record.sha256 == ""
    assert third.record.ok and third.record.source == "c.jpg"


def test_a_stage_is_not_needed_if_the_source_provides_its_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.sources.files import LocalFiles

    shard = Shard(tmp_path, "a.jpg")
    monkeypatch.setattr(
        LocalFiles, "provided_fields", lambda self, item: frozenset({"caption", "faces"})
    )
    task = ShardTask(shard=shard.plan.shards[0])
    [fresh] = load_shard(shard.config, shard.store, task, chain())
    assert fresh.remaining_stages == ALL - {"caption", "detect"}, (
        "the filter provides no field, so it is still needed"
    )
    stages = chain()
    caption, measure = (stages[NAMES.index(name)] for name in ("caption", "measure"))
    caption.provides, caption.annotation = ("caption", Answers.name), Answers
    measure.annotation = Measures
    [fresh] = load_shard(shard.config, shard.store, task, stages)
    assert fresh.remaining_stages == ALL - {"caption", "detect"}, (
        "no source has annotations: a caption that comes with an input isn't checked"
    )
    shard.committed()
    loaded = shard.load(["detect", "quality_filter", "caption"])
    assert remaining(loaded) == {"a.jpg": {"quality_filter"}}


def test_a_plan_that_changed_during_the_run_is_an_error(tmp_path: Path) -> None:
    shard = Shard(tmp_path, "a.jpg")
    task = ShardTask(shard=replace(shard.plan.shards[0], inputs=2))
    with pytest.raises(ShardError, match="was changed during this run"):
        list(load_shard(shard.config, shard.store, task, chain()))
