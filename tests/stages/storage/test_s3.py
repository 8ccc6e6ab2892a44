"""Data sets on an S3 server behind a proxy that injects faults: equal bytes, the order of commits,
errors, and resume.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from typer.testing import CliRunner

from configs.errors import ConfigError, LockedError, SourceError, StoreError
from pipelines.cli import app
from pipelines.ledger import read_ledger
from pipelines.lint import lint, lint_total
from pipelines.run import execute, plan_job
from pipelines.run import run as run_chain
from pipelines.sources import build_source
from pipelines.takedown import by_source, take_down
from stages.storage.layout import LOCK
from stages.storage.lock import RunLock
from stages.storage.reader import DatasetReader
from stages.storage.store import TRIES, Store
from tests.pipelines.helpers import DEMO, config, digests
from tests.pipelines.stub_chain import stub_chain
from tests.stages.storage.helpers import HOLDER, command, settings, write_scenes
from tests.stages.storage.s3_server import ENVIRONMENT, KINDS, Bucket, Faults, Proxy
from train.shards import ShardSet

run = partial(run_chain, chain=stub_chain)  # what the stages do doesn't matter here
SECRET = ENVIRONMENT["AWS_SECRET_ACCESS_KEY"]
pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two inputs, for two shards."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder)
    return folder


@pytest.fixture(scope="module")
def expected(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """File name → digest, of a run to a local folder."""
    output = tmp_path_factory.mktemp("expected")
    run(settings(scenes, output))
    return digests(output)


@dataclass(frozen=True)
class FinishedRun:
    """A bucket after a run; the changes to it, in order; and the manifests that were inconsistent
    after any of these changes.
    """

    bucket: Bucket
    changes: list[tuple[str, str]]
    inconsistent: list[str]


@pytest.fixture(scope="module")
def finished(server_and_client: tuple[Proxy, Any], scenes: Path) -> FinishedRun:
    server, client = server_and_client
    bucket = Bucket(client, server)
    inconsistent = bucket.watch()
    run(settings(scenes, bucket.out))
    return FinishedRun(bucket, bucket.changes(), inconsistent)


def test_a_run_to_s3_writes_the_bytes_of_a_local_run_and_a_second_run_writes_nothing(
    finished: FinishedRun, scenes: Path, expected: dict[str, str]
) -> None:
    bucket = finished.bucket
    assert bucket.digests() == expected
    assert list(lint(Store(bucket.out))) == []
    assert f"out/{LOCK}" not in bucket.stamps()
    before = bucket.stamps()
    bucket.proxy.reset()
    run(settings(scenes, bucket.out))
    assert bucket.stamps() == before
    assert bucket.proxy.changes(f"/{bucket.name}/") == []


def test_lint_downloads_each_file_once_and_fast_lint_no_tar(
    finished: FinishedRun, bucket: Bucket, scenes: Path
) -> None:
    bucket.copy_of(finished.bucket)
    store = Store(bucket.out)
    removed = by_source(store, "ann.jpg")
    take_down(store, settings(scenes, bucket.out), removed, "source", "", stub_chain)
    sizes = store.sizes("shards")
    names = [name for name in sizes if name.endswith((".tar", ".parquet"))]
    read: list[int] = []
    bucket.proxy.reset()
    assert list(lint(store, advance=read.append)) == []
    assert bucket.downloads() == dict.fromkeys(sizes, 1)
    assert sum(read) == sum(sizes[name] for name in names) == lint_total(store, fast=False)
    bucket.proxy.reset()
    assert list(lint(store, fast=True)) == []
    assert bucket.downloads() == {name: 1 for name in sizes if name not in names}


@pytest.mark.parametrize("fast", [False, True])
def test_lint_finds_damaged_objects(finished: FinishedRun, bucket: Bucket, fast: bool) -> None:
    bucket.copy_of(finished.bucket)
    tar = bucket.read("out/shards/fgid-000001.tar")
    bucket.put("out/shards/fgid-000001.tar", tar[:-1])
    first = bucket.read("out/shards/fgid-000000.tar")
    bucket.put("out/shards/fgid-000000.tar", first[::-1])
    bucket.put("out/identities.parquet", b"")
    Store(bucket.out).remove("plan.parquet")
    result = CliRunner().invoke(app, ["lint", bucket.out, *(["--fast"] if fast else [])])
    lines = result.stdout.splitlines()
    assert result.exit_code == 1 and "Traceback" not in result.stdout
    for name in ("plan.parquet is missing", "identities.parquet is damaged", "fgid-000001.tar has"):
        assert len([line for line in lines if name in line]) == 1, lines
    assert lines[-1].startswith("2 shards checked, ")
    swapped = [line for line in lines if "fgid-000000.tar" in line]
    assert bool(swapped) != fast, "only its digest differs"


def test_the_trainer_reads_samples_from_s3(finished: FinishedRun) -> None:
    data = ShardSet(finished.bucket.out)
    records = [
        record
        for index in (0, 1)
        for record in DatasetReader(Store(finished.bucket.out)).records(index)
    ]
    assert [data.key(number) for number in (0, 1)] == [record.key for record in records]
    assert [record.image for record in data.records([1, 0])] == [records[1].image, records[0].image]
    assert data.dataset_config() == finished.bucket.read("out/config.yaml").decode()


def test_a_manifest_is_written_last_removed_first_and_always_matches_its_files(
    finished: FinishedRun, bucket: Bucket, scenes: Path
) -> None:
    written = [
        [("PUT", f"fgid-00000{n}.{end}") for end in ("tar", "parquet", "json")] for n in (0, 1)
    ]
    assert finished.changes == [*written[0], *written[1]]
    assert finished.inconsistent == []
    bucket.copy_of(finished.bucket)
    inconsistent = bucket.watch()
    run(settings(scenes, bucket.out, "caption.llava.prompt=Who?"))
    removed = [[("DELETE", f"fgid-00000{n}.json")] for n in (0, 1)]
    assert bucket.changes() == [*removed[0], *written[0], *removed[1], *written[1]]
    assert inconsistent == []


def test_a_run_writes_the_same_bytes_if_responses_are_errors_late_cut_or_lost(
    bucket: Bucket, scenes: Path, expected: dict[str, str]
) -> None:
    source = bucket.upload(scenes)
    bucket.proxy.reset(Faults(share=0.3, seed=1))
    ledger = run(settings(source, bucket.out))
    faults = list(lint(Store(bucket.out)))
    assert {request.fault for request in bucket.proxy.requests} >= set(KINDS)
    assert (ledger.written, faults) == (2, [])
    assert bucket.digests() == expected


def test_an_upload_that_always_fails_is_an_error_and_the_next_run_completes_the_data_set(
    bucket: Bucket, scenes: Path, expected: dict[str, str]
) -> None:
    bucket.proxy.reset(
        Faults(always=lambda method, target: "500" if method == "PUT" and "1.tar" in target else "")
    )
    with pytest.raises(
        StoreError,
        match=rf"a request to {bucket.out} failed: .*out of order.* run the same command again",
    ):
        run(settings(scenes, bucket.out))
    assert bucket.manifests() == ["fgid-000000.json"]
    assert len([r for r in bucket.proxy.requests if r.fault]) == TRIES
    bucket.proxy.reset()
    run(settings(scenes, bucket.out))
    assert bucket.digests() == expected


def test_a_permanent_error_is_not_retried(bucket: Bucket) -> None:
    bucket.proxy.reset(Faults(always=lambda method, target: "403"))
    with pytest.raises(StoreError, match="allow reading, writing"):
        Store(bucket.out).write("a", b"")
    assert [(r.method, r.fault) for r in bucket.proxy.requests] == [("PUT", "403")]


def test_a_missing_bucket_and_invalid_urls_are_errors(bucket: Bucket) -> None:
    with pytest.raises(StoreError, match=r"s3://nobodys/out .*bucket does not exist"):
        Store("s3://nobodys/out").write("a", b"")
    with pytest.raises(ConfigError, match="has no path"):
        Store("s3://")
    with pytest.raises(ConfigError, match="Protocol not known"):
        Store("s4://bucket/out")
    with pytest.raises(ConfigError, match="https://…@host/out was given with a password") as caught:
        Store(f"https://me:{SECRET}@host/out")
    assert SECRET not in str(caught.value)


def test_a_writer_that_raises_uploads_nothing(bucket: Bucket) -> None:
    store = Store(bucket.out)
    with pytest.raises(RuntimeError), store.writer("shards/a.tar") as stream:
        stream.write(b"half")
        raise RuntimeError
    assert bucket.stamps() == {} and bucket.proxy.requests == []


def test_an_upload_in_parts_succeeds_if_the_last_response_is_lost(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = ["lost", "404"]  # S3 responds with 404 if a finished upload is finished again

    def fail_at_the_end(method: str, target: str) -> str:
        return faults.pop(0) if method == "POST" and "uploadId=" in target and faults else ""

    data = b"".join(bytes([number]) * (1 << 20) for number in range(11))
    bucket.proxy.reset(Faults(always=fail_at_the_end))
    store = Store(bucket.out)
    # the smallest parts that S3 accepts; without this, files of over 100 MiB are sent in parts
    smaller = partial(store._fs.put_file, chunksize=5 << 20)
    monkeypatch.setattr(store._fs, "put_file", smaller)
    monkeypatch.setattr("stages.storage.store._IN_MEMORY", 10 << 20)
    store.write("large", data)
    assert faults == [] and [r for r in bucket.proxy.requests if "partNumber=3" in r.query]
    with store.open("large") as stream:  # from a local copy
        assert hashlib.file_digest(stream, "sha256").digest() == hashlib.sha256(data).digest()


def test_listings_of_several_pages_and_missing_files(bucket: Bucket) -> None:
    store = Store(f"{bucket.out}[1] *")
    names = [f"{number:02}.json" for number in range(10)]
    for name in names:
        store.write(f"shards/{name}", name)
    assert store.names("shards") == names and store.names("elsewhere") == []
    assert store.read_all([*(f"shards/{name}" for name in names), "shards/10.json"]) == {
        f"shards/{name}": name.encode() for name in names
    }
    store.remove("shards/03.json")
    # listings are not cached
    assert not store.exists("shards/03.json") and len(store.names("shards")) == 9
    with pytest.raises(FileNotFoundError):
        store.read("shards/03.json")


def test_the_lock_refuses_a_second_run_and_is_replaced_after_a_dead_one(bucket: Bucket) -> None:
    store = Store(bucket.out)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, bucket.out], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match="give another output"), RunLock(store):
            pass
    finally:
        holder.kill()
        holder.wait()
    with RunLock(store):
        assert json.loads(bucket.read(f"out/{LOCK}"))["pid"] == os.getpid()
        store.create(LOCK, "another's")
        assert json.loads(bucket.read(f"out/{LOCK}"))["pid"] == os.getpid()
    assert bucket.stamps() == {}


@pytest.mark.slow
def test_a_run_that_was_killed_during_an_upload_continues_to_the_same_bytes(
    bucket: Bucket, scenes: Path, expected: dict[str, str]
) -> None:
    arguments = command(scenes, bucket.out, "executor=inline")
    driver = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill_within_a_shard() -> None:
        if bucket.changes()[-1:] == [("PUT", "fgid-000001.tar")]:
            driver.kill()

    bucket.proxy.changed = kill_within_a_shard
    assert driver.wait(timeout=120) == -9, "the run ended before it could be killed"
    assert bucket.manifests() == ["fgid-000000.json"] and f"out/{LOCK}" in bucket.stamps()
    bucket.proxy.reset()
    run(settings(scenes, bucket.out))
    assert bucket.digests() == expected and f"out/{LOCK}" not in bucket.stamps()
    assert [path for _, path in bucket.changes() if "000000" in path] == []
    assert list(lint(Store(bucket.out))) == []


@pytest.mark.thorough
def test_ray_reads_from_and_writes_to_s3_and_writes_no_keys(
    bucket: Bucket, portraits: Path, tmp_path: Path
) -> None:
    """The real command with the real stages."""
    (photos := tmp_path / "photos").mkdir()
    for path in sorted(portraits.glob("*.jpg"))[:2]:
        shutil.copy2(path, photos)
    run_chain(config(photos, tmp_path / "local", "shard_size=1"))
    overrides = ("shard_size=1", "threads=1", "executor=ray", "ray.workers=1")
    paths = f"source.path={bucket.upload(photos)}", f"output={bucket.out}"
    arguments = [sys.executable, "-m", "pipelines.cli", "run", "-c", DEMO, *paths, *overrides]
    process = subprocess.run(arguments, check=True, capture_output=True)
    assert bucket.digests() == digests(tmp_path / "local")
    files = {key: bucket.read(key) for key in bucket.stamps() if key.startswith("out/")}
    assert {"out/config.yaml", "out/dataset.json", "out/report/index.html"} <= set(files)
    files["printed"] = process.stdout + process.stderr
    assert [key for key, data in files.items() if SECRET.encode() in data] == []


def test_a_source_on_s3_is_listed_completely_with_unusual_names(bucket: Bucket) -> None:
    names = [
        "a.jpg",
        "b/c/d.JPG",
        "per%20cent.png",
        "q?x=1.jpg",
        "h#h.jpg",
        "ünï/çodé.webp",
        "a/../b.jpg",
        "st*r[1].jpg",
    ]
    for name in names:
        bucket.put(f"in/{name}", name.encode())
    for name in ("in/folder.jpg/", "in/notes.txt", "input/x.jpg"):
        bucket.put(name, b"")
    bucket.put("in/empty.jpg", b"")
    source = build_source(config(f"s3://{bucket.name}/in/", bucket.out))
    bucket.proxy.reset(Faults(share=0.3, seed=3))
    contents = {item.source: source.read_with_retries(item) for item in source.list()}
    assert contents == {name: name.encode() for name in names} | {"empty.jpg": b""}
    bucket.put("in/new.jpg", b"")
    assert "new.jpg" in {item.source for item in source.list()}  # listings are not cached
    glob = build_source(config(f"s3://{bucket.name}/in/b/**/*.JPG", bucket.out))
    assert [item.source for item in glob.list()] == ["c/d.JPG"]


def test_a_listing_that_fails_is_an_error_not_an_empty_folder(bucket: Bucket) -> None:
    bucket.put("in/a.jpg", b"x")
    bucket.put("in/deep/b.jpg", b"x")
    bucket.proxy.reset(
        Faults(always=lambda method, target: "500" if "prefix=in%2Fdeep" in target else "")
    )
    with pytest.raises(SourceError, match=r"can't be listed at .*in/deep"):
        list(build_source(config(f"s3://{bucket.name}/in", bucket.out, "source.tries=2")).list())
    with pytest.raises(SourceError, match="isn't there"):
        list(build_source(config(f"s3://{bucket.name}/missing", bucket.out)).list())


def test_inputs_that_were_unreachable_are_processed_by_retry(
    bucket: Bucket, scenes: Path, expected: dict[str, str]
) -> None:
    source = bucket.upload(scenes)
    second = sorted(scenes.iterdir())[1].name
    configuration = settings(source, bucket.out, "source.tries=2")
    bucket.proxy.reset(
        Faults(always=lambda method, target: "503" if method == "GET" and second in target else "")
    )
    ledger = run(configuration)
    assert (ledger.written, dict(ledger.failed)) == (1, {"unreachable": 1})
    assert len([r for r in bucket.proxy.requests if r.fault]) == 2  # source.tries
    bucket.proxy.reset()
    assert plan_job(configuration, chain=stub_chain).tasks == []
    job = plan_job(configuration, frozenset({"unreachable"}), stub_chain)
    assert [task.shard.index for task in job.tasks] == [1]
    list(execute(job, lambda count: None))
    assert read_ledger(job.store).written == 2
    assert bucket.digests() == expected


def test_a_folder_on_a_web_server_is_a_source(tmp_path: Path) -> None:
    root = tmp_path / "www"
    for name in ("a b.jpg", "deep/er/ü.jpg", "notes.txt"):
        (root / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "in" / name).write_bytes(name.encode())
    (root / "beside.jpg").write_bytes(b"x")
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(root))
    )
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        source = build_source(
            config(f"http://127.0.0.1:{server.server_port}/in/", tmp_path / "out")
        )
        contents = {item.source: source.read_with_retries(item) for item in source.list()}
        assert contents == {name: name.encode() for name in ("a b.jpg", "deep/er/ü.jpg")}
        # although the server doesn't support range requests
        assert source.read_with_retries(next(iter(source.list())), 2) in (b"a ", b"de")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
