"""Ray on a local cluster: it has the results of inline, also if a run is stopped or records kill
their workers.

All tests of this file share a cluster, except for a run in a separate process.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import ServerError
from configs.schema import RayConfig
from pipelines.lint import lint
from pipelines.preview import caption, preview
from pipelines.run import Job, execute, plan_job, run
from stages.executors.cluster import ray_cluster
from stages.executors.inline import run_inline
from stages.executors.ray_data import run_ray
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.pipelines.helpers import config, digests
from tests.stages.chat_server import ChatServer, Reply, Request, completion, refusal
from tests.stages.executors.captioned import KEY, captioned, mentions_key, settings
from tests.stages.executors.stopped import FOUR_SHARDS, arguments, stopped
from tests.stages.executors.toy import Result, ToyJob, ToyTask
from tests.stages.executors.traps import trapped
from tests.stages.records import same_record

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster that is started with the key in the environment, which its workers copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        with ray_cluster(RayConfig()):
            yield


def by_index(results: list[Result]) -> dict[int, list[tuple[str, str]]]:
    return {result.index: result.texts for result in results}


def test_a_job_on_ray_has_the_results_of_inline() -> None:
    tasks = [ToyTask(index, 1 + index) for index in range(4)]
    advanced: list[int] = []
    results = list(run_ray(ToyJob(), tasks, advanced.append))
    assert by_index(results) == by_index(list(run_inline(ToyJob(), tasks, lambda count: None)))
    assert sum(advanced) == 10
    assert {(result.run.executor, result.run.attempt) for result in results} == {("ray", 1)}
    assert all(set(result.run.seconds) == {"source", "coarse", "fine"} for result in results)


def test_a_preview_on_ray_has_the_captions_of_inline(portraits: Path, tmp_path: Path) -> None:
    job = plan_job(config(portraits, tmp_path / "out", "shard_size=2"))
    inline = preview(job)
    assert inline and [record.ok for record in inline.records] == [True] * 3
    records = [replace(record, caption="", face_caption="") for record in inline.records]
    on_ray = caption(job, records, "ray").records
    assert all(same_record(*pair) for pair in zip(on_ray, inline.records, strict=True))


def test_a_stopped_and_resumed_run_on_ray_writes_the_bytes_of_inline(
    portraits: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    code, errors = stopped(arguments(portraits, tmp_path, "ray"), tmp_path, signal.SIGINT)
    assert code == 130, errors
    assert "The same command continues" in errors and "Traceback" not in errors
    assert not (tmp_path / "run.lock").exists()
    remaining = 8 - 2 * len(list(shards.glob("*.json")))
    advanced: list[int] = []
    overrides = [*FOUR_SHARDS, "executor=ray", "ray.workers=1"]
    ledger = run(config(portraits, tmp_path, *overrides), advanced.append)
    assert digests(tmp_path) == expected
    assert ledger.inputs == 8 and sum(advanced) == remaining > 0
    assert list(lint(Store(str(tmp_path)))) == []
    assert not [path.name for path in shards.iterdir() if ".tmp-" in path.name]


def test_images_that_kill_or_hang_their_worker_fail_and_no_others(
    four: Path, tmp_path: Path
) -> None:
    photos = Path(shutil.copytree(four, tmp_path / "photos"))
    first, second, *others = sorted(photos.iterdir())
    first.rename(photos / "killer.jpg")
    second.rename(photos / "sleeper.jpg")
    overrides = [
        "shard_size=2",
        "executor=ray",
        "stuck_after=4",
        "ray.deaths=1",
        "ray.workers=1",
        "global_pass.max_similarity=0",
    ]
    job = plan_job(config(photos, tmp_path / "out", *overrides), chain=trapped)
    manifests = list(execute(job, lambda count: None))
    rows = [
        row
        for index in range(2)
        for row in DatasetReader(Store(job.config.output)).rows(index).to_pylist()
    ]
    failed = {
        row["source"]: (row["status"], row["reason"], row["stage"])
        for row in rows
        if row["status"] != "ok"
    }
    assert failed == {
        "killer.jpg": ("failed", "killed_worker", "trap"),
        "sleeper.jpg": ("failed", "timed_out", "trap"),
    }
    assert sum(manifest.written for manifest in manifests) == len(others) == 2
    assert max(manifest.run.attempt for manifest in manifests) == 2, (
        "the first attempt in a worker, the second in a child process"
    )


def test_captions_equal_those_of_inline_and_a_server_that_then_refuses_the_key_ends_the_run(
    four: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with ChatServer() as server:
        list(execute(plan(four, tmp_path / "inline", server, "inline"), lambda count: None))
    answered: set[bytes] = set()

    def decide(request: Request) -> Reply:
        """Answers for two photos, which are one shard; refuses when that is committed."""
        if len(answered) < 2 and not request.is_plain:
            answered.add(request.jpeg)
        if request.jpeg in answered or not answered:
            return completion(request)
        for _ in range(600):
            if list((tmp_path / "ray" / "shards").glob("*.json")):
                break
            time.sleep(0.05)
        return refusal(401, "no")

    with ChatServer(decide) as server:
        job = plan(four, tmp_path / "ray", server, "ray")
        with pytest.raises(ServerError, match="refuses the key") as raised:
            list(execute(job, lambda count: None))
    assert "Failed to" not in str(raised.value), "Ray's own advice"
    printed = "".join(capfd.readouterr())  # the server in this process may print tracebacks
    assert "RayTaskError" not in printed and "ray/data" not in printed
    assert {request.key for request in server.requests} == {KEY}
    (manifest,) = DatasetReader(job.store).manifests().values()
    tokens = {"prompt_tokens": 2 * 2 * 7, "completion_tokens": 2 * 2 * 3}
    assert (manifest.inputs, manifest.run.stage_counts) == (2, {"caption": tokens})
    inline, ray = (shard_files(tmp_path / executor) for executor in ("inline", "ray"))
    assert len(ray) == 2 and ray.items() <= inline.items()
    assert not mentions_key(tmp_path / "inline") and not mentions_key(tmp_path / "ray")


def plan(source: Path, output: Path, server: ChatServer, executor: str) -> Job:
    return plan_job(settings(source, output, server, executor), chain=captioned)


def shard_files(output: Path) -> dict[str, bytes]:
    """File name → bytes, of tars and sidecars."""
    files = (output / "shards").iterdir()
    return {file.name: file.read_bytes() for file in files if file.suffix != ".json"}
