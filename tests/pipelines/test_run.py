"""The data set run: ledger, resume, and what a second run does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from configs.errors import ShardError, SourceError
from pipelines.demo.poison import EXPECTED
from pipelines.ledger import read_ledger
from pipelines.lint import lint
from pipelines.planning.resume import NO_STAGES
from pipelines.run import Job, execute, plan_job, run
from stages.base import Stage
from stages.record import Record, key_of
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.pipelines.helpers import config, count_model_calls, digests, new_captions, stamps


@pytest.fixture(scope="module")
def made(poisoned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made")
    run(config(poisoned, output))
    return output


def test_every_poisoned_file_has_its_reason_and_the_ledger_balances(made: Path) -> None:
    store = Store(str(made))
    found = {}
    for index, manifest in enumerate(DatasetReader(store).manifests().values()):
        rows = DatasetReader(store).rows(index).to_pylist()
        assert len(rows) == manifest.inputs
        found.update({row["source"]: (row["status"], row["reason"]) for row in rows})
    assert found == {
        name: (expected.status, expected.reason) for name, expected in EXPECTED.items()
    }
    ledger = read_ledger(store)
    assert (
        ledger.inputs
        == len(EXPECTED)
        == ledger.written + ledger.dropped.total() + ledger.failed.total()
    )
    assert list(lint(store)) == []


def test_pictures_turned_by_exif_or_in_other_colour_spaces_come_out_upright_rgb(made: Path) -> None:
    records = {
        r.source: r for index in range(4) for r in DatasetReader(Store(str(made))).records(index)
    }
    for name in ("exif.rotated.jpg", "cmyk.jpg", "sixteen bit.png", "ünïcode/alpha.png"):
        left_eye, right_eye = records[name].main_face.landmarks[:2]
        mouth = records[name].main_face.landmarks[3]
        assert left_eye[0] < right_eye[0] and left_eye[1] < mouth[1], f"{name} is not upright"
        assert records[name].caption and records[name].face_caption


def test_a_second_run_makes_no_model_call_and_writes_nothing(
    made: Path, poisoned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stamps(made)
    calls: list[str] = []
    for stage in plan_job(config(poisoned, made)).stages:
        _count(stage, calls, monkeypatch)
    job = plan_job(config(poisoned, made))
    assert job.tasks == []
    assert list(execute(job, lambda count: None)) == []
    assert calls == [] and stamps(made) == before


def _count(stage: Stage, calls: list[str], patch: pytest.MonkeyPatch) -> None:
    kind = type(stage)
    real = kind.process

    def counted(self: Stage, records: list[Record]) -> list[Record]:
        calls.append(self.name)
        return real(self, records)

    patch.setattr(kind, "process", counted)


def test_a_later_stages_change_runs_that_stage_only_and_equals_a_run_from_scratch(
    poisoned: Path, tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(made, output)
    new_captions(monkeypatch)
    job = plan_job(config(poisoned, output))
    assert {task.stale_stages for task in job.tasks} == {frozenset({"caption", "review"})}
    calls: list[str] = []
    for stage in job.stages:
        _count(stage, calls, monkeypatch)
    ran = count_model_calls(monkeypatch)
    list(execute(job, lambda count: None))
    assert set(calls) == {"caption", "review"}
    assert ran == [], "no detector, parser or embedder"
    fresh = tmp_path / "fresh"
    run(config(poisoned, fresh))
    assert set(ran) == {"onnx", "torch"}, "what counts the models must see them"
    assert digests(output) == digests(fresh)


def test_new_inputs_make_new_shards_and_leave_the_old_alone(
    portraits: Path, tmp_path: Path
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    files = sorted(portraits.glob("*.jpg"))
    for path in files[2:5]:
        shutil.copy2(path, source)
    run(config(source, output, "shard_size=2"))
    before = digests(output)
    shutil.copy2(files[0], source)  # sorts before all the others
    job = plan_job(config(source, output, "shard_size=2"))
    assert [task.shard.index for task in job.tasks] == [2] and job.plan.new == 1
    list(execute(job, lambda count: None))
    after = digests(output)
    shards = {name: digest for name, digest in before.items() if name.startswith("fgid-")}
    assert {name: after[name] for name in shards} == shards and len(after) == len(before) + 2


def test_a_changed_input_is_noticed(portraits: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    one, two = sorted(portraits.glob("*.jpg"))[:2]
    shutil.copy2(one, source / "a.jpg")
    run(config(source, output))
    (source / "a.jpg").write_bytes(two.read_bytes())
    job = plan_job(config(source, output))
    assert job.plan.changed == 1 and [task.inputs_changed for task in job.tasks] == [True]


def test_a_shard_without_a_manifest_does_not_exist_and_traces_of_a_kill_go(
    made: Path, poisoned: Path, tmp_path: Path
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(made, output)
    (output / "shards" / "fgid-000001.json").unlink()
    (output / "shards" / ".fgid-000001.tar.tmp-12345678").write_bytes(b"half")
    job = plan_job(config(poisoned, output))
    assert [task.shard.index for task in job.tasks] == [1]
    list(execute(job, lambda count: None))
    assert digests(output) == digests(made)
    assert not [path for path in (output / "shards").iterdir() if ".tmp-" in path.name]


def test_a_plan_kept_by_another_version_is_a_clear_error(
    made: Path, poisoned: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(made, tmp_path / "copy"))
    kept = pq.read_table(output / "plan.parquet")
    pq.write_table(kept.drop_columns(["locator"]), output / "plan.parquet")
    with pytest.raises(
        ShardError, match="no column locator: another version of this program wrote it"
    ):
        plan_job(config(poisoned, output))


def test_lint_finds_a_flipped_byte(made: Path, tmp_path: Path) -> None:
    output = tmp_path / "copy"
    shutil.copytree(made, output)
    tar = output / "shards" / "fgid-000000.tar"
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(data)
    assert [line for line in lint(Store(str(output))) if "fgid-000000.tar" in line]


def test_an_empty_or_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="holds no"):
        plan_job(config(tmp_path / "empty", tmp_path / "out"))
    with pytest.raises(SourceError, match="not a folder"):
        plan_job(config(tmp_path / "missing", tmp_path / "out"))


def test_retry_makes_just_those_inputs_again(
    portraits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(portraits, source)
    files = sorted(source.glob("*.jpg"))
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:5000])
    files[6].write_bytes(b"<html>")
    stamp = files[1].stat()
    run(config(source, output))
    files[1].write_bytes(whole)  # mended; a mount that was away comes back with the very same times
    os.utime(files[1], ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    job = plan_job(config(source, output), frozenset({"truncated"}))
    [task] = job.tasks
    assert (task.shard.index, task.stale_stages, task.retry) == (0, NO_STAGES, {"truncated"})
    assert _remade(job, monkeypatch) == {key_of(files[1].name)}
    assert digests(output) == _from_scratch(source, tmp_path)
    assert read_ledger(Store(str(output))).failed == {"not_an_image": 1}


def test_one_changed_picture_is_made_again_and_its_neighbours_are_not(
    portraits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(portraits, source)
    files = sorted(source.glob("*.jpg"))
    run(config(source, output))
    files[2].write_bytes(files[2].read_bytes() + b"\0")
    for path in files[:4]:
        os.utime(path)  # touched, as by a copy that keeps no times
    job = plan_job(config(source, output))
    assert job.plan.changed == 4 and [task.shard.index for task in job.tasks] == [0]
    assert _remade(job, monkeypatch) == {key_of(files[2].name)}
    assert digests(output) == _from_scratch(source, tmp_path)
    assert plan_job(config(source, output)).tasks == []


def test_what_has_vanished_from_the_source_stays_in_its_shard(
    portraits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(portraits, source)
    run(config(source, output))
    before = digests(output)
    sorted(source.glob("*.jpg"))[3].unlink()
    job = plan_job(config(source, output))
    assert (job.plan.vanished, job.tasks) == (1, [])
    # from the shards: the picture isn't needed
    new_captions(monkeypatch)
    assert run(config(source, output)).written == 8
    assert set(digests(output)) == set(before)


def _from_scratch(source: Path, folder: Path) -> dict[str, str]:
    run(config(source, folder / "fresh"))
    return digests(folder / "fresh")


def _remade(job: Job, patch: pytest.MonkeyPatch) -> set[str]:
    """Executes the job; the keys that any of its stages was given."""
    seen: set[str] = set()

    def watch(kind: type[Stage]) -> None:
        real = kind.process

        def watched(self: Stage, records: list[Record]) -> list[Record]:
            seen.update(record.key for record in records)
            return real(self, records)

        patch.setattr(kind, "process", watched)

    for stage in job.stages:
        watch(type(stage))
    list(execute(job, lambda count: None))
    patch.undo()
    return seen
