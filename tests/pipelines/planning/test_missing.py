"""Inputs that are gone or can't be read any more: no sample is lost unless the user says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.errors import SourceError
from pipelines.cli import app
from pipelines.run import plan_job
from stages.storage.samples import to_members
from stages.storage.sidecar import is_quarantined
from tests.pipelines import incremental
from tests.pipelines.helpers import digests, rows_of
from tests.pipelines.incremental import IncrementalDataSet
from tests.pipelines.stub_chain import Scene, stub_chain

ANN = Scene(person="ann").encode()
BLURRED = Scene(person="ann", shot=2, sharpness=0.2).encode()
BOB = Scene(person="bob").encode()
CAT = Scene(person="cat").encode()


@pytest.fixture
def data(tmp_path: Path) -> IncrementalDataSet:
    """Two shards; the second input is quarantined, the third fails."""
    data = IncrementalDataSet(tmp_path / "data")
    data.change(min_sharpness=0.3)
    for name, scene in (("a", ANN), ("b", BLURRED), ("c", b"not a scene"), ("d", BOB), ("e", CAT)):
        data.put(f"photo-{name}.jpg", scene)
    data.run()
    return data


def make_stale(data: IncrementalDataSet) -> None:
    """Changes a setting of the first stage: all shards are made from the source again."""
    data.change(jpeg_quality=90)


def test_a_run_from_the_source_stops_before_it_writes_if_sources_are_gone(
    data: IncrementalDataSet,
) -> None:
    make_stale(data)
    for name in ("photo-b.jpg", "photo-c.jpg", "photo-e.jpg"):
        data.remove(name)
    before = digests(data.output)
    message = (
        r"2 of 4 samples would be lost.* 'photo-b.jpg': not_a_file \(the source no longer lists it"
        r"\); 'photo-e.jpg': not_a_file .*source\.missing=keep"
    )
    with pytest.raises(SourceError, match=message):
        plan_job(data.config, chain=stub_chain)
    assert digests(data.output) == before


@pytest.mark.parametrize("content", [b"", bytes(5000)], ids=["empty", "zeros"])
def test_a_run_stops_before_it_writes_if_changed_sources_hold_nothing(
    data: IncrementalDataSet, content: bytes
) -> None:
    for name in ("photo-a.jpg", "photo-b.jpg", "photo-d.jpg"):  # copies of each other now
        data.put(name, content)
    reason = "not_an_image" if content else "not_an_image|empty_file"
    with pytest.raises(SourceError, match=rf"3 of 4 samples .* 'photo-a.jpg': ({reason})"):
        plan_job(data.config, chain=stub_chain)


def test_a_run_stops_at_a_source_that_turns_out_to_be_damaged(data: IncrementalDataSet) -> None:
    before = digests(data.output)
    data.put("photo-d.jpg", BOB[:-3])
    with pytest.raises(SourceError, match=r"'photo-d.jpg': undecodable \(not a scene\)"):
        incremental.run(data.config)
    assert digests(data.output) == before


def test_an_unreadable_file_stops_the_run(data: IncrementalDataSet) -> None:
    data.touch("photo-a.jpg")
    data.touch("photo-d.jpg")
    (data.source / "photo-a.jpg").unlink()
    (data.source / "photo-a.jpg").mkdir()
    with pytest.raises(SourceError, match=r"1 of 4 samples .* 'photo-a.jpg': not_a_file"):
        plan_job(data.config, chain=stub_chain)


def test_missing_keep_keeps_each_whole_sample_and_makes_the_others_again(
    data: IncrementalDataSet,
) -> None:
    before = {row["source"]: row for row in rows_of(data.output)}
    samples = {record.key: record for index in (0, 1) for record in data.reader.records(index)}
    make_stale(data)
    data.change(missing="keep", min_sharpness=0.3)
    for name in ("photo-a.jpg", "photo-b.jpg"):
        data.remove(name)
    data.put("photo-e.jpg", bytes(5000))
    incremental.run(data.config)
    after = {row["source"]: row for row in rows_of(data.output)}
    assert after["photo-d.jpg"]["sample_sha256"] != before["photo-d.jpg"]["sample_sha256"]
    assert is_quarantined(after["photo-b.jpg"])
    now = {record.key: record for index in (0, 1) for record in data.reader.records(index)}
    for name in ("photo-a.jpg", "photo-b.jpg", "photo-e.jpg"):
        key = before[name]["key"]
        assert to_members(now[key], ()) == to_members(samples[key], ())
    assert plan_job(data.config, chain=stub_chain).tasks == []


def test_missing_keep_makes_stale_captions_of_kept_samples_again(data: IncrementalDataSet) -> None:
    data.remove("photo-a.jpg")
    data.put("photo-d.jpg", bytes(5000))
    data.change(missing="keep", prompt="B")
    incremental.run(data.config)
    captions = {row["source"]: row["caption"] for row in rows_of(data.output)}
    assert {captions[f"photo-{name}.jpg"][0] for name in "ade"} == {"B"}


def test_missing_drop_drops_samples_whose_inputs_are_gone(data: IncrementalDataSet) -> None:
    data.remove("photo-a.jpg")
    data.change(missing="drop")
    data.run()
    assert data.row("photo-a.jpg")["reason"] == "not_a_file"


def test_a_retry_stops_if_it_would_lose_a_quarantined_sample(data: IncrementalDataSet) -> None:
    data.remove("photo-b.jpg")
    with pytest.raises(SourceError, match=r"1 of 2 samples .* 'photo-b.jpg': not_a_file"):
        plan_job(data.config, frozenset({"blurred"}), stub_chain)


def test_the_command_says_which_samples_would_be_lost(tmp_path: Path, portraits: Path) -> None:
    """The case of the report: three sources are deleted, the others are touched and zeroed."""
    source, output = tmp_path / "photos", tmp_path / "out"
    source.mkdir()
    for number in range(2):
        (source / f"{number}.jpg").write_bytes(sorted(portraits.iterdir())[number].read_bytes())
    options = [f"source.path={source}", f"output={output}", "executor=inline", "threads=1"]
    runner = CliRunner()
    command = ["run", "-c", "configs/dataset/demo.yaml", *options]
    assert runner.invoke(app, command).exit_code == 0
    before = digests(output)
    (source / "0.jpg").write_bytes(bytes((source / "0.jpg").stat().st_size))
    (source / "1.jpg").unlink()
    (source / "2.jpg").write_bytes(b"new")
    result = runner.invoke(app, command)
    assert result.exit_code == 2
    assert "error: 1 of 2 samples would be lost" in result.stderr, result.stderr
    assert "'0.jpg': not_an_image (its first 4,096 bytes are zeros)" in result.stderr
    assert digests(output) == before


def test_drop_refuses_a_source_that_lists_nothing(data: IncrementalDataSet) -> None:
    data.change(missing="drop")
    for name in tuple(data.files):
        data.remove(name)
    with pytest.raises(SourceError, match=r"lists no input, and .* would drop all 5 of"):
        plan_job(data.config, chain=stub_chain)


@pytest.mark.parametrize("missing", ["keep", "stop"])
def test_a_source_folder_that_is_gone_is_an_error_unless_samples_are_kept(
    data: IncrementalDataSet, missing: str
) -> None:
    before = digests(data.output)
    make_stale(data)
    data.change(missing=missing)
    data.source.rename(data.folder / "elsewhere")
    if missing == "stop":
        with pytest.raises(SourceError, match="is not a folder"):
            plan_job(data.config, chain=stub_chain)
        return
    incremental.run(data.config)
    tars = {name: digest for name, digest in before.items() if name.endswith(".tar")}
    assert tars.items() <= digests(data.output).items()
