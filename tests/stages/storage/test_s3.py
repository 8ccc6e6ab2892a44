"""On a real S3 server behind a proxy that spoils answers: the same bytes, manifests last, clear
ends, and resume.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import boto3
import fsspec
import pytest

from configs.errors import ConfigError, LockedError, SourceError, StoreError
from pipelines.ledger import read_ledger
from pipelines.lint import lint
from pipelines.run import execute, plan_job, run
from pipelines.sources import build_source
from stages.storage.lock import NAME, RunLock
from stages.storage.reader import DatasetReader
from stages.storage.store import TRIES, Store
from tests.pipelines.helpers import DEMO, config, digests, new_captions
from tests.stages.storage.helpers import HOLDER
from tests.stages.storage.s3_server import Bucket, Faults, Proxy, proxy, s3_server
from train.shards import ShardSet

SECRET = "not-to-be-seen-anywhere"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "somebody",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",  # botocore leaves trying again to us
}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Proxy, Any]]:
    """The proxy, and a client past it; the environment names the server, as a user's would."""
    with s3_server() as port, proxy(port) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("FSSPEC_S3_ENDPOINT_URL", server.url)
        patch.setitem(fsspec.config.conf, "s3", {})
        fsspec.config.set_conf_env(fsspec.config.conf)  # as at import
        yield server, boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")


@pytest.fixture
def bucket(served: tuple[Proxy, Any]) -> Bucket:
    server, client = served
    server.reset()
    return Bucket(client, server)


@pytest.fixture(scope="module")
def faces(portraits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two portraits, which the runs below make into two shards."""
    folder = tmp_path_factory.mktemp("faces")
    for path in sorted(portraits.glob("*.jpg"))[:2]:
        shutil.copy2(path, folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("undisturbed")
    run(config(faces, output, "shard_size=1"))
    return digests(output)


@dataclass(frozen=True)
class Made:
    """What a run into a bucket left there; how it came there; and what was torn at any moment of
    it.
    """

    bucket: Bucket
    changes: list[tuple[str, str]]
    torn: list[str]


@pytest.fixture(scope="module")
def made(served: tuple[Proxy, Any], faces: Path) -> Made:
    server, client = served
    bucket, torn = Bucket(client, server), list[str]()
    server.changed = lambda: torn.extend(bucket.torn())
    run(config(faces, bucket.out, "shard_size=1"))
    return Made(bucket, bucket.changes(), torn)


def command(source: Path | str, output: str, *overrides: str) -> list[str]:
    given = [f"source.path={source}", f"output={output}", "shard_size=1", "threads=1", *overrides]
    return [sys.executable, "-m", "pipelines.cli", "run", "--config", DEMO, *given]


def test_a_run_into_s3_gives_the_bytes_of_a_local_one_and_a_second_run_writes_nothing(
    made: Made, faces: Path, undisturbed: dict[str, str]
) -> None:
    bucket = made.bucket
    assert bucket.digests() == undisturbed
    assert list(lint(Store(bucket.out))) == []
    assert f"out/{NAME}" not in bucket.stamps()
    before = bucket.stamps()
    bucket.proxy.reset()
    run(config(faces, bucket.out, "shard_size=1"))
    assert bucket.stamps() == before
    assert bucket.proxy.changes(f"/{bucket.name}/") == []


def test_the_trainer_reads_it_in_place(made: Made) -> None:
    data = ShardSet(made.bucket.out)
    records = [
        record
        for index in (0, 1)
        for record in DatasetReader(Store(made.bucket.out)).records(index)
    ]
    assert data.keys == [record.key for record in records]
    assert [record.image for record in data.records([1, 0])] == [records[1].image, records[0].image]
    assert data.dataset_config() == made.bucket.read("out/config.yaml").decode()


def test_a_manifest_comes_last_goes_first_and_never_tells_of_half_a_shard(
    made: Made, bucket: Bucket, faces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = [
        [("PUT", f"fgid-00000{n}.{end}") for end in ("tar", "parquet", "json")] for n in (0, 1)
    ]
    assert made.changes == [*written[0], *written[1]]
    assert made.torn == []
    bucket.copy_of(made.bucket)
    torn: list[str] = []
    bucket.proxy.changed = lambda: torn.extend(bucket.torn())
    new_captions(monkeypatch)
    run(config(faces, bucket.out, "shard_size=1"))
    gone = [[("DELETE", f"fgid-00000{n}.json")] for n in (0, 1)]
    assert bucket.changes() == [*gone[0], *written[0], *gone[1], *written[1]]
    assert torn == []


def test_the_same_bytes_while_answers_fail_are_late_cut_or_lost(
    bucket: Bucket, faces: Path, undisturbed: dict[str, str]
) -> None:
    source = bucket.upload(faces)
    bucket.proxy.reset(Faults(share=0.3, seed=1))
    ledger = run(config(source, bucket.out, "shard_size=1"))
    faults = list(lint(Store(bucket.out)))
    assert {request.fault for request in bucket.proxy.requests} >= {
        "500",
        "503",
        "slow",
        "cut",
        "lost",
    }
    assert (ledger.written, faults) == (2, [])
    assert bucket.digests() == undisturbed


def test_an_upload_that_fails_for_good_says_so_and_the_next_run_completes(
    bucket: Bucket, faces: Path, undisturbed: dict[str, str]
) -> None:
    bucket.proxy.reset(
        Faults(always=lambda method, target: "500" if method == "PUT" and "1.tar" in target else "")
    )
    with pytest.raises(
        StoreError,
        match=rf"{bucket.out} doesn't answer .*out of order.* run the same command again",
    ):
        run(config(faces, bucket.out, "shard_size=1"))
    assert bucket.manifests() == ["fgid-000000.json"]
    assert len([r for r in bucket.proxy.requests if r.fault]) == TRIES
    bucket.proxy.reset()
    run(config(faces, bucket.out, "shard_size=1"))
    assert bucket.digests() == undisturbed


def test_what_will_not_pass_is_not_tried_again(bucket: Bucket) -> None:
    bucket.proxy.reset(Faults(always=lambda method, target: "403"))
    with pytest.raises(StoreError, match="allow reading, writing"):
        Store(bucket.out).write("a", b"")
    assert [(r.method, r.fault) for r in bucket.proxy.requests] == [("PUT", "403")]


def test_a_bucket_that_is_not_there_and_urls_that_cannot_be_are_clear_errors(
    bucket: Bucket,
) -> None:
    with pytest.raises(StoreError, match=r"s3://nobodys/out .*bucket does not exist"):
        Store("s3://nobodys/out").write("a", b"")
    with pytest.raises(ConfigError, match="names no place"):
        Store("s3://")
    with pytest.raises(ConfigError, match="Protocol not known"):
        Store("s4://bucket/out")
    with pytest.raises(ConfigError, match="https://…@host/out was given with a password") as told:
        Store(f"https://me:{SECRET}@host/out")
    assert SECRET not in str(told.value)


def test_a_writer_that_raises_uploads_nothing(bucket: Bucket) -> None:
    store = Store(bucket.out)
    with pytest.raises(RuntimeError), store.writer("shards/a.tar") as stream:
        stream.write(b"half")
        raise RuntimeError
    assert bucket.stamps() == {} and bucket.proxy.requests == []


def test_a_large_file_is_uploaded_in_parts_though_the_last_answer_is_lost(bucket: Bucket) -> None:
    ends = ["lost", "404"]  # S3's own answer to finishing what it has finished

    def spoil_the_end(method: str, target: str) -> str:
        return ends.pop(0) if method == "POST" and "uploadId=" in target and ends else ""

    data = b"".join(bytes([number]) * (1 << 20) for number in range(101))
    bucket.proxy.reset(Faults(always=spoil_the_end))
    store = Store(bucket.out)
    store.write("large", data)
    assert ends == [] and [r for r in bucket.proxy.requests if "partNumber=3" in r.query]
    with store.open("large") as stream:  # by way of a local copy
        assert hashlib.file_digest(stream, "sha256").digest() == hashlib.sha256(data).digest()


def test_names_over_several_pages_and_files_that_are_missing(bucket: Bucket) -> None:
    store = Store(f"{bucket.out}[1] *")
    names = [f"{number:02}.json" for number in range(10)]
    for name in names:
        store.write(f"shards/{name}", name)
    assert store.names("shards") == names and store.names("elsewhere") == []
    assert store.read_all([*(f"shards/{name}" for name in names), "shards/10.json"]) == {
        f"shards/{name}": name.encode() for name in names
    }
    store.remove("shards/03.json")
    # nothing is remembered
    assert not store.exists("shards/03.json") and len(store.names("shards")) == 9
    with pytest.raises(FileNotFoundError):
        store.read("shards/03.json")


def test_the_lock_refuses_a_second_run_and_knows_a_dead_one(bucket: Bucket) -> None:
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
        assert json.loads(bucket.read(f"out/{NAME}"))["pid"] == os.getpid()
        store.create(NAME, "another's")
        assert json.loads(bucket.read(f"out/{NAME}"))["pid"] == os.getpid()
    assert bucket.stamps() == {}


@pytest.mark.slow
def test_killing_the_driver_mid_upload_and_running_again_gives_the_same_bytes(
    bucket: Bucket, faces: Path, undisturbed: dict[str, str]
) -> None:
    given = command(faces, bucket.out, "executor=inline")
    driver = subprocess.Popen(given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill_within_a_shard() -> None:
        if bucket.changes()[-1:] == [("PUT", "fgid-000001.tar")]:
            driver.kill()

    bucket.proxy.changed = kill_within_a_shard
    assert driver.wait(timeout=120) == -9, "the run ended before it could be killed"
    assert bucket.manifests() == ["fgid-000000.json"] and f"out/{NAME}" in bucket.stamps()
    bucket.proxy.reset()
    run(config(faces, bucket.out, "shard_size=1"))
    assert bucket.digests() == undisturbed and f"out/{NAME}" not in bucket.stamps()
    assert [path for _, path in bucket.changes() if "000000" in path] == []
    assert list(lint(Store(bucket.out))) == []


@pytest.mark.slow
def test_ray_from_s3_into_s3_with_keys_from_the_environment_that_are_kept_nowhere(
    bucket: Bucket, faces: Path, undisturbed: dict[str, str]
) -> None:
    source = bucket.upload(faces)
    given = command(source, bucket.out, "executor=ray")
    said = subprocess.run(given, check=True, capture_output=True)
    assert bucket.digests() == undisturbed
    kept = {key: bucket.read(key) for key in bucket.stamps() if key.startswith("out/")}
    assert {"out/config.yaml", "out/dataset.json", "out/report/index.html"} <= set(kept)
    assert [
        key
        for key, data in {**kept, "said": said.stdout + said.stderr}.items()
        if SECRET.encode() in data
    ] == []


def test_a_source_on_s3_is_listed_whole_under_odd_names(bucket: Bucket) -> None:
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
    found = {item.source: source.read_with_retries(item) for item in source.list()}
    assert found == {name: name.encode() for name in names} | {"empty.jpg": b""}
    bucket.put("in/new.jpg", b"")
    assert "new.jpg" in {item.source for item in source.list()}  # no listing is remembered
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


def test_what_was_unreachable_is_mended_by_retry(
    bucket: Bucket, faces: Path, undisturbed: dict[str, str]
) -> None:
    source = bucket.upload(faces)
    second = sorted(faces.iterdir())[1].name
    settings = config(source, bucket.out, "shard_size=1", "source.tries=2")
    bucket.proxy.reset(
        Faults(always=lambda method, target: "503" if method == "GET" and second in target else "")
    )
    ledger = run(settings)
    assert (ledger.written, dict(ledger.failed)) == (1, {"unreachable": 1})
    assert len([r for r in bucket.proxy.requests if r.fault]) == 2  # as often as source.tries says
    bucket.proxy.reset()
    assert plan_job(settings).tasks == []
    job = plan_job(settings, frozenset({"unreachable"}))
    assert [task.shard.index for task in job.tasks] == [1]
    list(execute(job, lambda count: None))
    assert read_ledger(job.store).written == 2
    assert bucket.digests() == undisturbed


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
        found = {item.source: source.read_with_retries(item) for item in source.list()}
        assert found == {name: name.encode() for name in ("a b.jpg", "deep/er/ü.jpg")}
        # though the server knows no parts
        assert source.read_with_retries(next(iter(source.list())), 2) in (b"a ", b"de")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
