"""Plans, tables and shards that are lost are made again; other files are no shard."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import ConfigError
from pipelines.lint import lint
from pipelines.run import plan_job
from stages.storage.layout import DUPLICATES, PLAN
from stages.storage.repair import find_damage
from tests.pipelines import incremental
from tests.pipelines.damaged import (
    ANN,
    CAT,
    MANIFEST,
    QUARANTINE,
    SIDECAR,
    TAR,
    damage,
    lose_sources,
    make,
    repair,
)
from tests.pipelines.helpers import digests, rows_of
from tests.pipelines.incremental import IncrementalDataSet
from tests.pipelines.stub_chain import stub_chain


@pytest.fixture
def data(tmp_path: Path) -> IncrementalDataSet:
    return make(tmp_path)


@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_a_plan_and_a_sidecar_are_made_again_together(data: IncrementalDataSet, how: str) -> None:
    before = rows_of(data.output)
    damage(data, PLAN, how)
    damage(data, SIDECAR, how)
    if how == "truncated":  # else the inputs without a written sample get another shard
        damage(data, TAR, how)
    assert incremental.run(data.config, repair=True) == []
    assert plan_job(data.config, chain=stub_chain).tasks == [] == [*lint(data.store)]
    rows = sorted(rows_of(data.output), key=lambda row: row["source"])
    names = ("key", "source", "sha256", "status", "reason", "stage")
    assert [[row[n] for n in names] for row in rows] == [[row[n] for n in names] for row in before]


def test_a_plan_and_a_sidecar_that_are_lost_cost_no_written_sample_if_all_sources_are_gone(
    data: IncrementalDataSet,
) -> None:
    before = {row["key"] for row in rows_of(data.output) if row["status"] == "ok"}
    damage(data, PLAN, "missing")
    damage(data, SIDECAR, "missing")
    lose_sources(data)
    incremental.run(data.config, repair=True)
    assert {row["key"] for row in rows_of(data.output) if row["status"] == "ok"} == before
    assert [*lint(data.store)] == []


def test_a_run_makes_a_shard_again_of_which_all_files_and_the_plan_are_lost(
    data: IncrementalDataSet,
) -> None:
    before = digests(data.output)
    for name in (TAR, QUARANTINE, SIDECAR, MANIFEST, PLAN):
        damage(data, name, "missing")
    data.run()
    assert digests(data.output) == before


def test_a_lost_plan_with_fewer_new_inputs_than_lost_shards_is_valid(
    data: IncrementalDataSet,
) -> None:
    """Shard 0 has no input then."""
    for name in (TAR, QUARANTINE, SIDECAR, MANIFEST, PLAN):
        damage(data, name, "missing")
    for name in "abc":
        data.remove(f"photo-{name}.jpg")
    for _ in range(2):
        incremental.run(data.config)
    assert [row["source"] for row in rows_of(data.output)] == ["photo-d.jpg", "photo-e.jpg"]
    assert [*lint(data.store)] == []


@pytest.mark.parametrize("content", [b"x", MANIFEST])
def test_a_repair_removes_a_manifest_of_no_shard(
    data: IncrementalDataSet, content: str | bytes
) -> None:
    """content: or the name of the file to copy."""
    before = digests(data.output)
    whole = (data.output / content).read_bytes() if isinstance(content, str) else content
    (data.output / "shards/fgid-000099.json").write_bytes(whole)
    repair(data)
    assert digests(data.output) == before
    assert [*lint(data.store)] == []


def test_files_with_other_names_are_no_shard(data: IncrementalDataSet) -> None:
    for name in ("fgid-000000 (copy).json", "fgid-old.json", "fgid-7.parquet", "fgid-old.tar"):
        (data.output / "shards" / name).write_bytes(b"x")
    assert incremental.run(data.config) == [] == find_damage(data.store)
    lines = [*lint(data.store)]
    assert len(lines) == 4 and all("belongs to no shard. Remove it." in line for line in lines)


def test_an_empty_list_of_duplicates_is_made_again(data: IncrementalDataSet) -> None:
    data.put("photo-e.jpg", CAT)
    data.run()
    before = digests(data.output)
    assert data.store.table(DUPLICATES).num_rows == 0
    damage(data, DUPLICATES, "missing")
    data.run()
    damage(data, DUPLICATES, "truncated")
    repair(data)
    assert digests(data.output) == before


def test_a_copy_of_a_sidecar_adds_nothing_to_a_plan_that_is_made_again(
    data: IncrementalDataSet,
) -> None:
    shutil.copy(data.output / SIDECAR, data.output / "shards/fgid-000007.parquet")
    damage(data, PLAN, "missing")
    incremental.run(data.config)
    assert plan_job(data.config, chain=stub_chain).plan.inputs == 5


def test_what_was_taken_down_keeps_its_place_in_a_plan_that_is_made_again(
    data: IncrementalDataSet,
) -> None:
    data.put("photo-f.jpg", ANN)  # an exact copy: its original goes with it, and photo-e
    data.put("photo-g.jpg", CAT)
    data.run()
    data.take_down("source", "photo-f.jpg")
    damage(data, PLAN, "missing")
    data.run()
    data.remove("photo-f.jpg")
    damage(data, PLAN, "missing")
    incremental.run(data.config)
    rows = rows_of(data.output)
    assert [row["reason"] for row in rows].count("taken_down") == 3 and len(rows) == 7


def test_a_repair_needs_no_source_folder(data: IncrementalDataSet) -> None:
    before = digests(data.output)
    damage(data, MANIFEST, "truncated")
    data.source.rename(data.folder / "elsewhere")
    incremental.run(data.config, repair=True)
    tars = {name: digest for name, digest in before.items() if name.endswith(".tar")}
    assert tars.items() <= digests(data.output).items()


def test_a_repair_of_an_output_without_shards_is_refused(
    data: IncrementalDataSet, tmp_path: Path
) -> None:
    config = replace(data.config, output=str(tmp_path / "typo"))
    with pytest.raises(ConfigError, match="typo has no shards"):
        plan_job(config, chain=stub_chain, repair=True)
