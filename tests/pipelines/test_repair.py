"""Damaged files: no damaged byte gets into a new shard, and `run --repair` makes again what is
damaged. `IncrementalDataSet` compares with a fresh run after each run.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import typer

from configs.errors import ShardError
from pipelines.cli.create import _report_repair
from pipelines.planning.missing import reason_text
from pipelines.run import execute, plan_job
from stages.storage.commit import ChainInfo, commit_exclusions
from stages.storage.layout import DUPLICATES, IDENTITIES, PLAN
from stages.storage.repair import find_damage
from stages.storage.sidecar import is_quarantined
from tests.pipelines import incremental, sigkill
from tests.pipelines.damaged import (
    CAT,
    HOW,
    MANIFEST,
    QUARANTINE,
    REPAIR,
    SIDECAR,
    TAR,
    damage,
    lose_sources,
    make,
    overwrite,
    repair,
)
from tests.pipelines.helpers import digests, rows_of
from tests.pipelines.incremental import IncrementalDataSet
from tests.pipelines.stub_chain import Scene, stub_chain


@pytest.fixture
def data(tmp_path: Path) -> IncrementalDataSet:
    return make(tmp_path)


@pytest.mark.parametrize("name", [TAR, QUARANTINE, SIDECAR])
@pytest.mark.parametrize("reuse", ["prompt", "take-down"])
def test_damage_is_not_copied_into_a_new_shard(
    data: IncrementalDataSet, name: str, reuse: str
) -> None:
    damage(data, name, "overwritten")
    before = (data.output / name).read_bytes()
    data.change(prompt="B")
    with pytest.raises(ShardError, match=rf"{name} is damaged: its sha256.* {REPAIR}"):
        if reuse == "prompt":
            incremental.run(data.config)
        else:
            commit_exclusions(
                data.store, data.reader.manifests()[0], ChainInfo.of(stub_chain(data.config))
            )
    assert (data.output / name).read_bytes() == before, "nothing was written"
    repair(data)


@pytest.mark.parametrize("name", [TAR, QUARANTINE, SIDECAR])
@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_a_run_with_nothing_to_do_finds_missing_and_truncated_files(
    data: IncrementalDataSet, name: str, how: str
) -> None:
    damage(data, name, how)
    size = "it is missing" if how == "missing" else "it has [0-9,]+"
    message = rf"{name} is damaged: {size}, expected [0-9,]+ bytes.* {REPAIR}"
    with pytest.raises(ShardError, match=message):
        incremental.run(data.config)


@pytest.mark.parametrize("name", [TAR, QUARANTINE, SIDECAR, MANIFEST, PLAN, DUPLICATES, IDENTITIES])
@pytest.mark.parametrize("how", HOW)
def test_a_repair_makes_the_same_bytes_again(data: IncrementalDataSet, name: str, how: str) -> None:
    before = digests(data.output)
    damage(data, name, how)
    reported = {each.name for each in find_damage(data.store)}
    is_remade_anyway = how == "missing" and name in (PLAN, DUPLICATES, IDENTITIES)
    assert reported == (set() if is_remade_anyway else {name})
    repair(data)
    assert digests(data.output) == before
    assert find_damage(data.store) == []


def test_a_repair_makes_a_shard_again_of_which_only_the_tar_is_left(
    data: IncrementalDataSet,
) -> None:
    before = digests(data.output)
    damage(data, MANIFEST, "truncated")
    damage(data, SIDECAR, "missing")
    repair(data)
    assert digests(data.output) == before


@pytest.mark.parametrize("name", [SIDECAR, MANIFEST, PLAN])
@pytest.mark.parametrize("how", HOW)
def test_a_repair_keeps_all_written_samples_if_no_tar_is_damaged_and_all_sources_are_gone(
    data: IncrementalDataSet, name: str, how: str
) -> None:
    tar = (data.output / TAR).read_bytes()
    before = {row["key"]: row for row in rows_of(data.output)}
    damage(data, name, how)
    lose_sources(data)
    lost = incremental.run(data.config, repair=True)
    # of a quarantined sample, only the sidecar says why it was dropped; c.jpg had no sample, which
    # a sidecar that is damaged in another column still says
    losses = {loss.source for loss in lost} - {"photo-c.jpg"}
    assert losses == ({"photo-b.jpg"} if name == SIDECAR else set())
    assert (data.output / TAR).read_bytes() == tar
    for row in rows_of(data.output):
        if row["status"] == "ok":
            assert row == before[row["key"]]
        elif row["source"] == "photo-b.jpg":
            assert is_quarantined(row) == (name != SIDECAR)


def test_a_repair_that_is_killed_again_and_again_loses_nothing(
    data: IncrementalDataSet, tmp_path: Path
) -> None:
    data.change(min_sharpness=0.0)
    data.run()
    damage(data, MANIFEST, "missing")
    lose_sources(data)
    data.put("photo-a.jpg", Scene(person="ann" * 500).encode())  # the other samples move in the tar
    arguments = incremental.run, data.config, frozenset[str](), True
    moment = 1
    while sigkill.killed(moment, tmp_path / "errors", *arguments):
        moment += 1
    assert moment > 10
    rows = {row["source"]: row for row in rows_of(data.output)}
    assert {rows[f"photo-{name}.jpg"]["status"] for name in "abd"} == {"ok"}


def test_a_repair_loses_only_the_damaged_sample_if_all_sources_are_gone(
    data: IncrementalDataSet,
) -> None:
    data.put("photo-f.jpg", CAT)
    data.run()
    row = data.row("photo-d.jpg")
    overwrite(data.output / "shards/fgid-000001.tar", row["tar_offset"] + 600)
    lose_sources(data)
    lost = incremental.run(data.config, repair=True)
    assert [(loss.source, loss.why) for loss in lost] == [
        ("photo-d.jpg", "not_a_file (the source no longer lists it)")
    ]
    rows = {row["source"]: row for row in rows_of(data.output)}
    assert rows["photo-d.jpg"]["reason"] == "not_a_file"
    assert rows["photo-f.jpg"]["status"] == rows["photo-a.jpg"]["status"] == "ok"
    assert is_quarantined(rows["photo-e.jpg"]), "a duplicate"
    assert find_damage(data.store) == []
    assert plan_job(data.config, chain=stub_chain).tasks == []


def test_a_repair_does_not_list_inputs_that_had_no_sample(data: IncrementalDataSet) -> None:
    data.put("photo-f.jpg", b"not a scene")
    data.run()
    damage(data, "shards/fgid-000001.tar", "missing")
    damage(data, "shards/fgid-000002.parquet", "missing")
    damage(data, "shards/fgid-000002.tar", "missing")
    assert incremental.run(data.config, repair=True) == []


@pytest.mark.parametrize("sidecar", [False, True])
def test_a_repair_lists_samples_whose_inputs_hold_zeros(
    data: IncrementalDataSet, sidecar: bool
) -> None:
    """Inputs of zeros are copies of each other. sidecar: it is damaged too."""
    for name in (TAR, QUARANTINE, *[SIDECAR] * sidecar):
        damage(data, name, "missing")
    for name in ("photo-a.jpg", "photo-b.jpg")[: 1 if sidecar else 2]:
        data.put(name, bytes(5000))
    lost = incremental.run(data.config, repair=True)
    assert [loss.source for loss in lost] == ["photo-a.jpg", "photo-b.jpg"][: 1 if sidecar else 2]


def test_each_sample_that_is_lost_is_named_in_one_line(
    data: IncrementalDataSet, capsys: pytest.CaptureFixture[str]
) -> None:
    data.put("odd\n\x1b[31m<b>.jpg", CAT)
    data.run()
    damage(data, "shards/fgid-000002.tar", "missing")
    data.remove("odd\n\x1b[31m<b>.jpg")
    job = plan_job(data.config, chain=stub_chain, repair=True)
    list(execute(job, lambda count: None))
    with pytest.raises(typer.Exit):
        _report_repair(job)
    [line, _] = capsys.readouterr().out.splitlines()
    name = r"'odd\n\x1b[31m<b>.jpg'"
    assert line == f"not repaired: {name}: not_a_file (the source no longer lists it)"


def test_a_reason_without_detail_has_no_brackets() -> None:
    assert reason_text("http_404", "") == "http_404"
    assert (
        reason_text("unreadable", "an error\nof two lines") == "unreadable (an error of two lines)"
    )


def test_a_manifest_with_wrong_numbers_is_damaged(data: IncrementalDataSet) -> None:
    file = data.output / MANIFEST
    whole = file.read_text()
    file.write_text(whole.replace('"written": 1', '"written": 7'))
    assert [each.name for each in find_damage(data.store)] == [MANIFEST]
    repair(data)
    assert data.reader.manifests()[0].written == 1


def test_a_repair_with_changed_settings_makes_both_changes(data: IncrementalDataSet) -> None:
    damage(data, TAR, "overwritten")
    data.change(prompt="B", min_sharpness=0.0)
    repair(data)


def test_a_repair_restores_nothing_of_what_was_taken_down(data: IncrementalDataSet) -> None:
    shutil.copytree(data.output, data.folder / "copy")
    data.take_down("source", "photo-a.jpg")
    damage(data, TAR, "overwritten")
    damage(data, MANIFEST, "truncated")
    # an old copy of the shard's sidecar, which still has the removed record
    shutil.copy(data.folder / "copy" / SIDECAR, data.output / SIDECAR)
    repair(data)


@pytest.mark.parametrize("how", ["missing", "truncated"])
@pytest.mark.parametrize("repairs", [True, False])
def test_without_the_removal_log_and_a_manifest_nothing_removed_comes_back(
    data: IncrementalDataSet, how: str, repairs: bool
) -> None:
    data.take_down("source", "photo-d.jpg")
    damage(data, "takedown.jsonl", "missing")
    damage(data, "shards/fgid-000001.json", how)
    before = digests(data.output)
    what = "takedown.jsonl is missing or empty, but fgid-000001 has removed records"
    if how == "truncated" and not repairs:
        what = "fgid-000001.json is not a manifest"
    with pytest.raises(ShardError, match=what):
        incremental.run(data.config, repair=repairs)
    assert digests(data.output) == before


@pytest.mark.parametrize(
    "staged",
    [
        {"fgid-000000.json": b"{"},
        {"fgid-000000.json": MANIFEST},
        {"fgid-000000.json": "shards/fgid-000001.json"},
        {"fgid-000000.json": MANIFEST, "fgid-000000.tar": b"x"},
        {"fgid-000000.json": MANIFEST, "fgid-000000.tar": TAR},
        {"fgid-old.json": b"{}", "note.txt": b"x"},
    ],
)
def test_staged_files_that_are_not_complete_replace_nothing(
    data: IncrementalDataSet, staged: dict[str, bytes | str]
) -> None:
    """staged: name → contents, or the name of the file to copy. The shard's samples are the only
    copy, since the sources are gone.
    """
    before = digests(data.output)
    lose_sources(data)
    (data.output / "staged").mkdir(exist_ok=True)
    for name, content in staged.items():
        whole = (data.output / content).read_bytes() if isinstance(content, str) else content
        (data.output / "staged" / name).write_bytes(whole)
    incremental.run(data.config)
    assert digests(data.output) == before
    assert [*(data.output / "staged").iterdir()] == []
    assert find_damage(data.store) == []


def test_a_take_down_refuses_a_shard_without_manifest(data: IncrementalDataSet) -> None:
    damage(data, MANIFEST, "missing")
    before = digests(data.output)
    with pytest.raises(ShardError, match=rf"{MANIFEST} is missing, .* --repair"):
        incremental.remove(data.output, "source", "photo-d.jpg")
    assert digests(data.output) == before
    data.run()
    data.take_down("source", "photo-d.jpg")
