"""Ray on a local cluster: it has the results of inline, also if records kill their workers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.run import execute, plan_job
from stages.executors.inline import run_inline
from stages.executors.ray_data import run_ray
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.pipelines.helpers import config
from tests.stages.executors.toy import Result, ToyJob, ToyTask
from tests.stages.executors.traps import trapped


def by_index(results: list[Result]) -> dict[int, list[tuple[str, str]]]:
    return {result.index: result.texts for result in results}


@pytest.mark.slow
def test_a_job_on_ray_has_the_results_of_inline() -> None:
    tasks = [ToyTask(index, 1 + index) for index in range(4)]
    advanced: list[int] = []
    results = list(run_ray(ToyJob(), tasks, advanced.append))
    assert by_index(results) == by_index(list(run_inline(ToyJob(), tasks, lambda count: None)))
    assert sum(advanced) == 10
    assert {(result.run.executor, result.run.attempt) for result in results} == {("ray", 1)}
    assert all(set(result.run.seconds) == {"source", "coarse", "fine"} for result in results)


@pytest.mark.slow
def test_images_that_kill_or_hang_their_worker_fail_and_no_others(
    portraits: Path, tmp_path: Path
) -> None:
    photos = Path(shutil.copytree(portraits, tmp_path / "photos"))
    first, second, *others = sorted(photos.iterdir())
    first.rename(photos / "killer.jpg")
    second.rename(photos / "sleeper.jpg")
    overrides = [
        "shard_size=4",
        "executor=ray",
        "stuck_after=4",
        "ray.deaths=1",
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
    assert sum(manifest.written for manifest in manifests) == len(others) == 6
    assert max(manifest.run.attempt for manifest in manifests) == 2, (
        "the first attempt in a worker, the second in a child process"
    )
