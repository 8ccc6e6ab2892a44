"""Runs of the pipeline: ledger, resume, changed inputs, retry, lint."""

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
def dataset(poisoned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("dataset")
    run(config(poisoned, output))
    return output


def test_every_poisoned_file_has_its_reason_and_the_ledger_adds_up(dataset: Path) -> None:
    store = Store(str(dataset))
    outcomes = {}
    for index, manifest in enumerate(DatasetReader(store).manifests().values()):
        rows = DatasetReader(store).rows(index).to_pylist()
        assert len(rows) == manifest.inputs
        outcomes.update({row["source"]: (row["status"], row["reason"]) for row in rows})
    assert outcomes == {
        name: (expected.status, expected.reason) for name, expected in EXPECTED.items()
    }
    ledger = read_ledger(store)
    assert (
        ledger.inputs
        == len(EXPECTED)
        == ledger.written + ledger.dropped.total() + ledger.failed.total()
    )
    assert list(lint(store)) == []


def test_images_rotated_by_exif_or_in_other_colour_spaces_become_upright_rgb(dataset: Path) -> None:
    records = {
        r.source: r for index in range(5) for r in DatasetReader(Store(str(dataset))).records(index)
    }
    written = {name for name, expected in EXPECTED.items() if expected.status == "ok"}
    for name in written:
        left_eye, right_eye = records[name].main_face.landmarks[:2]
        mouth = records[name].main_face.landmarks[3]
        assert left_eye[0] < right_eye[0] and left_eye[1] < mouth[1], f"{name} is not upright"
        assert records[name].caption and records[name].face_caption


def test_a_second_run_makes_no_model_call_and_writes_nothing(
    dataset: Path, poisoned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stamps(dataset)
    calls: list[str] = []
    for stage in plan_job(config(poisoned, dataset)).stages:
        _count(stage, calls, monkeypatch)
    job = plan_job(config(poisoned, dataset))
    assert job.tasks == []
    assert list(execute(job, lambda count: None)) == []
    assert calls == [] and stamps(dataset) == before


def _count(stage: Stage, calls: list[str], patch: pytest.MonkeyPatch) -> None:
    kind = type(stage)
    real = kind.process

    def counted(self: Stage, records: list[Record]) -> list[Record]:
        calls.append(self.name)
        return real(self, records)

    patch.setattr(kind, "process", counted)


def test_a_change_of_a_late_stage_runs_stale_stages_only_and_gives_the_bytes_of_a_new_run(
    poisoned: Path, tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(dataset, output)
    new_captions(monkeypatch)
    job = plan_job(config(poisoned, output))
    assert {task.stale_stages for task in job.tasks} == {frozenset({"caption", "claims", "review"})}
    calls: list[str] = []
    for stage in job.stages:
        _count(stage, calls, monkeypatch)
    ran = count_model_calls(monkeypatch)
    list(execute(job, lambda count: None))
    assert set(calls) == {"caption", "claims", "review"}
    assert ran == [], "no detector, parser or embedder"
    fresh = tmp_path / "fresh"
    run(config(poisoned, fresh))
    assert set(ran) == {"onnx", "torch"}, "the test needs a counter that counts all models"
    assert digests(output) == digests(fresh)


def test_new_inputs_go_into_new_shards_and_do_not_change_others(
    portraits: Path, tmp_path: Path
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    files = sorted(portraits.glob("*.jpg"))
    for path in files[2:5]:
        shutil.copy2(path, source)
    run(config(source, output, "shard_size=2"))
    before = digests(output)
    shutil.copy2(files[0], source)  # its name is before those of the others
    job = plan_job(config(source, output, "shard_size=2"))
    assert [task.shard.index for task in job.tasks] == [2] and job.plan.new == 1
    list(execute(job, lambda count: None))
    after = digests(output)
    shards = {name: digest for name, digest in before.items() if name.startswith("fgid-")}
    assert {name: after[name] for name in shards} == shards and len(after) == len(before) + 2


def test_a_changed_input_makes_its_shard_pending(portraits: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    one, two = sorted(portraits.glob("*.jpg"))[:2]
    shutil.copy2(one, source / "a.jpg")
    run(config(source, output))
    (source / "a.jpg").write_bytes(two.read_bytes())
    job = plan_job(config(source, output))
    assert job.plan.changed == 1 and [task.inputs_changed for task in job.tasks] == [True]


def test_a_shard_without_a_manifest_is_written_again_and_temporary_files_are_removed(
    dataset: Path, poisoned: Path, tmp_path: Path
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(dataset, output)
    (output / "shards" / "fgid-000001.json").unlink()
    (output / "shards" / ".fgid-000001.tar.tmp-12345678").write_bytes(b"partial")
    job = plan_job(config(poisoned, output))
    assert [task.shard.index for task in job.tasks] == [1]
    list(execute(job, lambda count: None))
    assert digests(output) == digests(dataset)
    assert not [path for path in (output / "shards").iterdir() if ".tmp-" in path.name]


def test_a_plan_of_another_program_version_is_an_error(
    dataset: Path, poisoned: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(dataset, tmp_path / "copy"))
    plan = pq.read_table(output / "plan.parquet")
    pq.write_table(plan.drop_columns(["locator"]), output / "plan.parquet")
    with pytest.raises(
        ShardError, match="no column locator: another version of this program wrote it"
    ):
        plan_job(config(poisoned, output))


def test_lint_finds_a_changed_byte(dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "copy"
    shutil.copytree(dataset, output)
    tar = output / "shards" / "fgid-000000.tar"
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(data)
    assert [line for line in lint(Store(str(output))) if "fgid-000000.tar" in line]


def test_an_empty_or_missing_source_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="holds no"):
        plan_job(config(tmp_path / "empty", tmp_path / "out"))
    with pytest.raises(SourceError, match="not a folder"):
        plan_job(config(tmp_path / "missing", tmp_path / "out"))


def test_retry_processes_inputs_with_the_reason_and_no_others(
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
    # complete again with its old times, as after a network folder was unavailable
    files[1].write_bytes(whole)
    os.utime(files[1], ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    job = plan_job(config(source, output), frozenset({"truncated"}))
    [task] = job.tasks
    assert (task.shard.index, task.stale_stages, task.retry) == (0, NO_STAGES, {"truncated"})
    assert _processed_keys(job, monkeypatch) == {key_of(files[1].name)}
    assert digests(output) == _from_scratch(source, tmp_path)
    assert read_ledger(Store(str(output))).failed == {"not_an_image": 1}


def test_a_changed_image_is_processed_again_and_others_of_its_shard_are_not(
    portraits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(portraits, source)
    files = sorted(source.glob("*.jpg"))
    run(config(source, output))
    files[2].write_bytes(files[2].read_bytes() + b"\0")
    for path in files[:4]:
        os.utime(path)  # another time of change, as after copying
    job = plan_job(config(source, output))
    assert job.plan.changed == 4 and [task.shard.index for task in job.tasks] == [0]
    assert _processed_keys(job, monkeypatch) == {key_of(files[2].name)}
    assert digests(output) == _from_scratch(source, tmp_path)
    assert plan_job(config(source, output)).tasks == []


def test_an_input_that_the_source_no_longer_lists_stays_in_its_shard(
    portraits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(portraits, source)
    run(config(source, output))
    before = digests(output)
    sorted(source.glob("*.jpg"))[3].unlink()
    job = plan_job(config(source, output))
    assert (job.plan.vanished, job.tasks) == (1, [])
    # captions are made from the shard's samples, so the source's file isn't needed
    new_captions(monkeypatch)
    assert run(config(source, output)).written == 8
    assert set(digests(output)) == set(before)


def _from_scratch(source: Path, folder: Path) -> dict[str, str]:
    run(config(source, folder / "fresh"))
    return digests(folder / "fresh")


def _processed_keys(job: Job, patch: pytest.MonkeyPatch) -> set[str]:
    """Executes the job. Returns the keys of all records that a stage processed."""
    keys: set[str] = set()

    def record_keys(kind: type[Stage]) -> None:
        real = kind.process

        def process(self: Stage, records: list[Record]) -> list[Record]:
            keys.update(record.key for record in records)
            return real(self, records)

        patch.setattr(kind, "process", process)

    for stage in job.stages:
        record_keys(type(stage))
    list(execute(job, lambda count: None))
    patch.undo()
    return keys
