"""Runs whose output is on an S3 server, behind a proxy that injects faults."""

from __future__ import annotations

import json
import multiprocessing
import shlex
import shutil
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from configs.errors import LockedError, StoreError, WeightsError
from configs.training import ModelConfig, OptimConfig, TrainConfig
from stages.storage.lock import RunLock
from stages.storage.store import Store
from tests.stages.storage.s3_server import ENVIRONMENT, Bucket, Faults, Proxy
from tests.train.helpers import Listener, run, same, small, sources, weights
from train.checkpoints import checkpoints, damage, own_digest
from train.cli import app
from train.history import read_lines
from train.mirror import Mirror, reading
from train.mixture import open_mixture
from train.resume import fetch_chosen

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("short_pauses")]


def settings(data: Path, base: Path, output: str, work: Path, **changes: object) -> TrainConfig:
    """Six steps and three checkpoints. output: a URL, or "" for a run to the folder `work`."""
    values: dict[str, object] = {
        "optim": OptimConfig(learning_rate=1e-3, lr_scheduler="constant"),
        "checkpointing_steps": 2,
        "max_train_steps": 6,
    }
    config = small(data, base, work, **{**values, **changes})
    return replace(config, output=output, work_folder=str(work)) if output else config


@pytest.fixture(scope="module")
def undisturbed(data: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run in a local folder."""
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    run(settings(data, tiny_base, "", output))
    return output


def remote(bucket: Bucket) -> dict[str, bytes]:
    """Name → contents of all files of the output."""
    return {key.removeprefix("out/"): bucket.read(key) for key in bucket.stamps()}


def local(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".sent"
    }


@dataclass(frozen=True)
class Finished:
    """A run to a bucket, through a proxy with faults. changes: (method, name), in order."""

    bucket: Bucket
    config: TrainConfig
    changes: list[tuple[str, str]]


@pytest.fixture(scope="module")
def finished(
    server_and_client: tuple[Proxy, Any],
    data: Path,
    tiny_base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Finished:
    server, client = server_and_client
    bucket = Bucket(client, server)
    bucket.proxy.reset(Faults(share=0.2, seed=5))
    work = tmp_path_factory.mktemp("finished") / "work"
    config = settings(data, tiny_base, bucket.out, work, checkpoints_total_limit=2)
    run(config)
    return Finished(bucket, config, server.changes(f"/{bucket.name}/out/"))


def copied(finished: Finished, bucket: Bucket, work: Path) -> TrainConfig:
    """Copies a finished run to another bucket and work folder, and returns its settings."""
    bucket.copy_of(finished.bucket)
    shutil.copytree(finished.config.work_folder, work)
    return replace(finished.config, output=bucket.out, work_folder=str(work))


def test_a_run_to_s3_has_all_its_files_there_in_spite_of_faults(
    finished: Finished, undisturbed: Path
) -> None:
    work, files = Path(finished.config.work_folder), remote(finished.bucket)
    assert same(weights(work / "final"), weights(undisturbed / "final"))
    assert files == local(work)
    assert {name.split("/")[0] for name in files} == {
        *("checkpoint-000004", "checkpoint-000006", "final"),
        *("config.yaml", "data.jsonl", "index", "losses.jsonl", "summary.json"),
        *("times.jsonl", "report"),
    }
    secret = ENVIRONMENT["AWS_SECRET_ACCESS_KEY"].encode()
    assert not [name for name, content in files.items() if secret in content]
    changed = [name for method, name in finished.changes if method != "DELETE"]
    for step in (2, 4, 6):
        mine = [name for name in changed if name.startswith(f"checkpoint-{step:06d}/")]
        assert mine[-1].endswith("files.json") and len(set(mine)) == 5
        assert changed.index("losses.jsonl") < changed.index(mine[0])
    removed = [name for method, name in finished.changes if method == "DELETE"]
    checkpoint = [name for name in removed if name.startswith("checkpoint-")]
    assert checkpoint[0] == "checkpoint-000002/files.json" and len(set(checkpoint)) == 5


def test_another_machine_resumes_from_the_newest_intact_checkpoint(
    finished: Finished, undisturbed: Path, bucket: Bucket, data: Path, tmp_path: Path
) -> None:
    config = copied(finished, bucket, tmp_path / "one")
    bucket.put("out/checkpoint-000006/state.pt", b"nonsense")
    bucket.put("out/checkpoint-000008/state.pt", b"an upload that was stopped")
    # without its sidecars, no index of the data set can be made
    unindexed = shutil.copytree(
        data, tmp_path / "data", ignore=shutil.ignore_patterns("fgid-*.parquet")
    )
    listener = Listener()
    two = replace(config, work_folder=str(tmp_path / "two"), data=sources(unindexed))
    outcome = run(two, listener)
    url = f"{bucket.out}/checkpoint"
    assert listener.messages[:2] == [
        f"{url}-000008 is passed over: it has no files.json, so it isn't complete",
        f"{url}-000006 is passed over: state.pt is not as it was written",
    ]
    assert "at step 4" in listener.messages[2]
    assert outcome.adapter and same(weights(outcome.adapter), weights(undisturbed / "final"))
    lines = [*read_lines(tmp_path / "two/losses.jsonl")]
    assert lines == [*read_lines(undisturbed / "losses.jsonl")]
    names = {name.split("/")[0] for name in remote(bucket)}
    assert "checkpoint-000006" in names and "checkpoint-000008" not in names


def test_a_kill_during_an_upload_and_another_machine_end_in_the_same_weights(
    undisturbed: Path, bucket: Bucket, data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = settings(data, tiny_base, bucket.out, tmp_path / "one")
    uploading, killed = threading.Event(), threading.Event()

    def stop_at(method: str, target: str) -> str:
        if method == "PUT" and "checkpoint-000004/state.pt" in target and not killed.is_set():
            uploading.set()
            killed.wait(60)
            return "500"
        return ""

    bucket.proxy.reset(Faults(always=stop_at))
    process = multiprocessing.get_context("fork").Process(target=run, args=(config,))
    process.start()
    try:
        assert uploading.wait(120)
    finally:
        process.kill()
        process.join()
        killed.set()
    assert "checkpoint-000004/files.json" not in remote(bucket)
    assert "checkpoint-000004/adapter.safetensors" in remote(bucket)
    listener = Listener()
    outcome = run(replace(config, work_folder=str(tmp_path / "two")), listener)
    assert "at step 2" in " ".join(listener.messages)
    assert outcome.adapter and same(weights(outcome.adapter), weights(undisturbed / "final"))


def test_a_store_that_fails_costs_no_local_work_and_is_an_error_at_the_end(
    undisturbed: Path, bucket: Bucket, data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    def refuse(method: str, target: str) -> str:
        return "403" if method == "PUT" and "checkpoint-" in target else ""

    bucket.proxy.reset(Faults(always=refuse))
    config, listener = settings(data, tiny_base, bucket.out, tmp_path / "work"), Listener()
    with pytest.raises(StoreError, match=r"work has the checkpoint of step 6, but it can't be up"):
        run(config, listener)
    failed = [text for text in listener.messages if "can't be uploaded now" in text]
    assert len(failed) == 3 and "the next checkpoint tries it again" in failed[0]
    assert same(weights(tmp_path / "work/final"), weights(undisturbed / "final"))
    bucket.proxy.reset()
    assert run(config).step == 6
    assert remote(bucket) == local(tmp_path / "work")


def test_a_run_that_was_continued_elsewhere_is_followed(
    finished: Finished, bucket: Bucket, tmp_path: Path
) -> None:
    one = copied(finished, bucket, tmp_path / "one")
    older = "checkpoint-000004"
    two = replace(
        one,
        work_folder=str(tmp_path / "two"),
        resume_from_checkpoint=older,
        max_train_steps=5,
    )
    run(two)
    assert not [name for name in remote(bucket) if "replaced" in name]
    listener = Listener()
    assert run(one, listener).step == 6  # its own checkpoint-000006 is of the abandoned run
    assert "one/checkpoint-000005 at step 5" in " ".join(listener.messages)
    folders = [path.name for path in checkpoints(tmp_path / "one")]
    assert folders == ["checkpoint-000005", "checkpoint-000006"]


def test_a_checkpoint_at_a_url_is_resumed_in_another_output(
    finished: Finished, tmp_path: Path
) -> None:
    url = f"{finished.bucket.out}/checkpoint"
    config = replace(
        finished.config,
        output=str(tmp_path / "new"),
        work_folder="",
        resume_from_checkpoint=f"{url}-000005",
    )
    with pytest.raises(WeightsError, match=r"000005 can't be used: it has no files\.json"):
        run(config)
    listener = Listener()
    run(replace(config, resume_from_checkpoint=f"{url}-000004"), listener)
    assert "at step 4" in listener.messages[0] and not list((tmp_path / "new").glob(".*"))


def test_other_machines_of_a_run_fetch_what_the_first_has_chosen(
    finished: Finished, bucket: Bucket, tmp_path: Path
) -> None:
    config = copied(finished, bucket, tmp_path / "one")
    bucket.put("out/base/unet/config.json", b"{}")
    bucket.put("out/index/digest.arrow", b"rows")
    chosen = tmp_path / "other/checkpoint-000004"
    earlier = shutil.copytree(
        tmp_path / "one/checkpoint-000006", chosen.with_name("checkpoint-000006")
    )
    (earlier / ".sent").touch()
    fetch_chosen(config, chosen, Mirror(bucket.out, tmp_path / "other"))
    assert local(chosen) == local(tmp_path / "one/checkpoint-000004") and not damage(chosen)
    assert not earlier.exists()
    assert (tmp_path / "other/base/unet/config.json").read_bytes() == b"{}"
    assert (tmp_path / "other/index/digest.arrow").read_bytes() == b"rows"


def test_the_url_is_locked(bucket: Bucket, data: Path, tiny_base: Path, tmp_path: Path) -> None:
    config = settings(data, tiny_base, bucket.out, tmp_path / "work")
    with RunLock(Store(bucket.out)), pytest.raises(LockedError, match=bucket.out):
        run(config)


@pytest.mark.parametrize("absolute", [True, False])
def test_a_list_of_files_that_leads_out_of_the_folder_is_damage(
    undisturbed: Path, bucket: Bucket, tmp_path: Path, absolute: bool
) -> None:
    name = str(tmp_path / "escaped") if absolute else "../../escaped"
    for path in (undisturbed / "checkpoint-000006").iterdir():
        bucket.put(f"out/checkpoint-000006/{path.name}", path.read_bytes())
    listing = json.loads((undisturbed / "checkpoint-000006/files.json").read_text())
    listing["files"][name] = listing["files"].pop("state.pt")
    del listing["sha256"]
    listing["sha256"] = own_digest(listing)
    bucket.put("out/checkpoint-000006/files.json", json.dumps(listing).encode())
    bucket.put(f"out/checkpoint-000006/{name}", b"")
    mirror = Mirror(bucket.out, tmp_path / "work" / "deep")
    assert mirror.fetch(6) == "files.json can't be read"
    assert [*tmp_path.rglob("*escaped*")] == [] and not checkpoints(tmp_path / "work/deep")


def test_pictures_of_validations_are_fetched(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("out/validation/000002.jpg", b"a picture")
    Mirror(bucket.out, tmp_path / "work").fetch_folders()
    assert (tmp_path / "work/validation/000002.jpg").read_bytes() == b"a picture"


def call(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.stderr if status else result.stdout


@dataclass(frozen=True)
class Elsewhere:
    """A run on another machine, so without the folder in which it worked, and with a base of its
    own. Each of its four steps has a checkpoint. keys: of the samples, in the order of training.

    The tests that use it change no file that another one needs.
    """

    bucket: Bucket
    keys: list[str]


@pytest.fixture(scope="module")
def elsewhere(
    server_and_client: tuple[Proxy, Any],
    data: Path,
    tiny_base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Elsewhere:
    server, client = server_and_client
    server.reset()
    bucket = Bucket(client, server)
    work = tmp_path_factory.mktemp("elsewhere") / "work"
    shutil.copytree(tiny_base, work / "base")
    config = settings(
        data,
        tiny_base,
        bucket.out,
        work,
        model=ModelConfig(spec="tiny", device="cpu"),
        seed=0,  # as the copied base
        max_train_steps=4,
        checkpointing_steps=1,
        checkpoints_total_limit=0,
    )
    run(config)
    shutil.rmtree(work)
    mixture = open_mixture(config)
    order = mixture.order(config.seed)
    return Elsewhere(bucket, [mixture.key(order.sample(place)) for place in range(8)])


def test_the_local_copy_of_a_url_is_removed(elsewhere: Elsewhere) -> None:
    elsewhere.bucket.proxy.reset()
    with reading() as runs:
        folder = runs.open(elsewhere.bucket.out)
        assert (folder / "data.jsonl").is_file()
    assert not folder.exists()


def test_replay_of_a_url_fetches_one_checkpoint_and_changes_nothing(elsewhere: Elsewhere) -> None:
    bucket, url = elsewhere.bucket, elsewhere.bucket.out
    bucket.proxy.reset()
    before = bucket.stamps()
    answer = json.loads(call("replay", f"{url}/", "--step", 3, "--json"))
    assert answer["equal"] and answer["checkpoint"] == f"{url}/checkpoint-000002"
    assert bucket.stamps() == before
    paths = [each.path for each in bucket.proxy.requests if each.path.endswith("state.pt")]
    assert {*paths} == {f"/{bucket.name}/out/checkpoint-000002/state.pt"}
    # a damaged one is passed over
    content = bytearray(bucket.read("out/checkpoint-000003/adapter.safetensors"))
    content[-1] ^= 1
    bucket.put("out/checkpoint-000003/adapter.safetensors", bytes(content))
    answer = json.loads(call("replay", url, "--step", 4, "--json"))
    assert answer["after_step"] == 2 and "1 step older" in answer["notes"][0]


def test_seen_of_a_url_prints_a_command_that_trains_on_from_there(elsewhere: Elsewhere) -> None:
    bucket, url, key = elsewhere.bucket, elsewhere.bucket.out, elsewhere.keys[6]
    bucket.proxy.reset()
    before = bucket.stamps()
    answer = json.loads(call("seen", url, "--key", key, "--json"))
    assert (answer["first_step"], answer["last_step"], answer["first_use"]) == (1, 4, 4)
    assert answer["checkpoint"] == f"{url}/checkpoint-000003"
    assert bucket.stamps() == before
    paths = [each.path for each in bucket.proxy.requests]
    assert not [path for path in paths if path.endswith(("state.pt", "adapter.safetensors"))]
    bucket.put("out/checkpoint-000003/state.pt", b"half of it")
    answer = json.loads(call("seen", url, "--key", key, "--json"))
    assert answer["checkpoint"] == f"{url}/checkpoint-000002"

    python, _, _, *arguments = shlex.split(answer["command"])
    assert python == "python" and f"output={url}-cleaned" in arguments
    [work] = [word for word in arguments if word.startswith("work_folder=")]
    call(*arguments)
    shutil.rmtree(work.removeprefix("work_folder="))
    # the new run's past is at the old URL
    answer = json.loads(call("replay", f"{url}-cleaned", "--step", 3, "--json"))
    assert answer["equal"] and answer["checkpoint"] == f"{url}/checkpoint-000002"
    first = elsewhere.keys[4]  # of step 3
    answer = json.loads(call("seen", f"{url}-cleaned", "--key", first, "--json"))
    assert (answer["first_use"], answer["last_step"]) == (3, 4)
    assert answer["checkpoint"] == f"{url}/checkpoint-000002"


def test_what_a_url_lacks_is_an_error_that_names_it(elsewhere: Elsewhere, bucket: Bucket) -> None:
    bucket.put("out/data.jsonl", elsewhere.bucket.read("out/data.jsonl"))
    error = call("seen", bucket.out, "--key", "a", status=2)
    assert error.startswith(f"error: {bucket.out}/index/") and "is missing or damaged" in error
    for command in (("replay", "--step", 3), ("seen", "--key", "a")):
        name, *options = command
        for nowhere in (f"{bucket.out}/nowhere", f"s3://no-{bucket.name}/run"):
            error = call(name, nowhere, *options, status=2)
            assert error.startswith(f"error: {nowhere}/data.jsonl is missing or empty")
        error = call(name, "s3://key:secret@bucket/run", *options, status=2)
        assert "with a password in it" in error and "secret" not in error
    error = call("run", "--config", f"{bucket.out}/config.yaml", status=2)
    assert error == f"error: no configuration at {bucket.out}/config.yaml\n"
