"""On a real local Ray cluster: the same bytes as inline, kills survived, and a picture that kills
its worker.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench.chains import resizing
from configs.errors import ConfigError, PipelineError
from configs.schema import DatasetConfig
from pipelines.run import execute, lint, plan_job, run
from pipelines.sources import build_source
from stages.base import run_chain
from stages.chain import build_stages
from stages.executors.isolate import Child, run_isolated
from stages.executors.placement import Node, plan_groups
from stages.storage.commit import read_sidecar
from stages.storage.store import Store
from tests.pipelines.helpers import DEMO, config, digests, hears_ctrl_c
from tests.stages.executors.traps import trapped

ALL = frozenset({"resize", "detect", "parse", "embed", "caption"})


@pytest.fixture(scope="module")
def undisturbed(portraits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("undisturbed")
    run(config(portraits, output, "shard_size=2"))
    return digests(output)


@pytest.mark.slow
def test_ray_gives_the_bytes_of_inline(
    portraits: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    seen = []
    ledger = run(config(portraits, tmp_path, "shard_size=2", "executor=ray"), seen.append)
    assert digests(tmp_path) == undisturbed
    assert ledger.inputs == sum(seen) == 8


def _stopped(command: list[str], shards: Path, how: signal.Signals) -> tuple[int, str]:
    """Exit status and last words of `command`, sent `how` when its first shard was committed."""
    driver = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hears_ctrl_c,
    )
    try:
        while driver.poll() is None and not list(shards.glob("*.json")):
            time.sleep(0.02)
    finally:
        if how is signal.SIGINT:
            os.killpg(driver.pid, how)  # as a terminal does: to every process of the group
        else:
            driver.kill()
    _, said = driver.communicate(timeout=60)
    return driver.returncode, said


@pytest.mark.slow
# Ray's driver is killed by `make chaos`.
@pytest.mark.parametrize(("executor", "how"), [("inline", signal.SIGKILL), ("ray", signal.SIGINT)])
def test_stopping_the_driver_mid_run_and_running_again_gives_the_same_bytes(
    executor: str, how: signal.Signals, portraits: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    given = [
        f"source.path={portraits}",
        f"output={tmp_path}",
        "shard_size=2",
        "threads=1",
        f"executor={executor}",
    ]
    command = [sys.executable, "-m", "pipelines.cli", "run", "--config", DEMO, *given]
    shards = tmp_path / "shards"
    for _ in range(3):  # it may have come to the end before it heard
        shutil.rmtree(tmp_path)
        code, said = _stopped(command, shards, how)
        if len(list(shards.glob("*.json"))) < 4:
            break
    else:
        pytest.fail("stopped too late, three times, to show anything")
    if how is signal.SIGINT:
        assert code == 130, said
        assert "The same command goes on" in said and "Traceback" not in said
        assert not (tmp_path / "run.lock").exists()
    else:
        assert code == -signal.SIGKILL, "the run ended before it could be killed"
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert digests(tmp_path) == undisturbed
    assert list(lint(Store(str(tmp_path)))) == []
    assert not [path.name for path in shards.iterdir() if ".tmp-" in path.name]


@pytest.mark.slow
def test_pictures_that_kill_or_hang_their_worker_are_lost_and_nothing_else_is(
    portraits: Path, tmp_path: Path
) -> None:
    photos = Path(shutil.copytree(portraits, tmp_path / "photos"))
    first, second, *others = sorted(photos.iterdir())
    first.rename(photos / "killer.jpg")
    second.rename(photos / "sleeper.jpg")
    given = [
        "shard_size=4",
        "executor=ray",
        "stuck_after=4",
        "ray.deaths=1",
        "global_pass.max_similarity=0",
    ]
    job = plan_job(config(photos, tmp_path / "out", *given), chain=trapped)
    done = list(execute(job, lambda count: None))
    rows = [
        row
        for index in range(2)
        for row in read_sidecar(Store(job.config.output), index).to_pylist()
    ]
    ended = {
        row["source"]: (row["status"], row["reason"], row["stage"])
        for row in rows
        if row["status"] != "ok"
    }
    assert ended == {
        "killer.jpg": ("failed", "killed_worker", "trap"),
        "sleeper.jpg": ("failed", "timed_out", "trap"),
    }
    assert sum(manifest["written"] for manifest in done) == len(others) == 6
    assert max(manifest["run"]["attempt"] for manifest in done) == 2, (
        "once in its worker, then apart"
    )


def test_isolated_pictures_give_the_same_records(portraits: Path, tmp_path: Path) -> None:
    job = plan_job(config(portraits, tmp_path, "shard_size=2"))
    stages = build_stages(job.config)[:2]
    for stage in stages:
        stage.setup()
    records = [build_source(job.config).record(item) for item in job.plan.inputs_of(0)]
    together = run_chain(stages, records)
    apart = run_isolated(job.config, stages, records, [ALL] * len(records), threads=1)
    assert [(r.image, r.faces) for r in apart] == [(r.image, r.faces) for r in together]


def test_a_picture_that_kills_its_process_is_lost_and_the_next_is_not(
    portraits: Path, tmp_path: Path
) -> None:
    job = plan_job(config(portraits, tmp_path))
    first, second, third = [
        build_source(job.config).record(item) for item in job.plan.inputs_of(0)
    ][:3]
    with Child(job.config, ["resize"], threads=1) as child:
        assert child.run(first, ALL).ok
        os.kill(child.pid, signal.SIGSEGV)
        killed = child.run(second, ALL)
        assert (killed.status, killed.reason) == (
            "failed",
            "killed_worker",
        ) and f"signal {signal.SIGSEGV:d}" in killed.detail
        assert child.run(third, ALL).ok


def test_another_chain_is_run_and_signed_in_place_of_the_real_one(
    portraits: Path, tmp_path: Path
) -> None:
    job = plan_job(config(portraits, tmp_path), chain=resizing)
    done = list(execute(job, lambda count: None))
    assert [manifest["written"] for manifest in done] == [4, 4]
    assert all(
        set(manifest["run"]["stage_seconds"]) == {"source", "resize", "fill"} for manifest in done
    )
    assert all(
        manifest["signatures"] == [stage.signature() for stage in resizing(job.config)]
        for manifest in done
    )
    assert plan_job(job.config, chain=resizing).tasks == []
    assert len(plan_job(job.config).tasks) == 2, "the real chain has everything still to do"


def test_a_child_process_builds_the_chain_it_is_told(portraits: Path, tmp_path: Path) -> None:
    job = plan_job(config(portraits, tmp_path), chain=resizing)
    record = build_source(job.config).record(job.plan.inputs_of(0)[0])
    given = ([record], [frozenset({"resize", "fill"})], 1)
    done = run_isolated(job.config, job.stages, *given, chain="bench.chains:resizing")
    assert done[0].identity is not None and (done[0].width, done[0].height) == (512, 512)


def test_an_error_that_is_no_pictures_fault_ends_an_isolated_run_too(
    portraits: Path, tmp_path: Path
) -> None:
    job = plan_job(config(portraits, tmp_path), chain=resizing)
    record = build_source(job.config).record(job.plan.inputs_of(0)[0])
    lonely = replace(record, source="lonely.jpg")
    remaining_stages = frozenset({"resize", "trap", "fill"})
    with Child(
        job.config, ["resize", "trap", "fill"], 1, "tests.stages.executors.traps:trapped"
    ) as child:
        assert child.run(record, remaining_stages).ok
        with pytest.raises(PipelineError, match="nobody answers"):
            child.run(lonely, remaining_stages)


def test_actors_leave_room_for_tasks_and_impossible_gpus_are_said() -> None:
    base = DatasetConfig()
    chain = build_stages(base)
    for cpus in (1, 2, 4, 64):
        groups = plan_groups(base, chain, [Node(cpus, 0)])
        assert [group.names for group in groups] == [tuple(stage.name for stage in chain)]
        assert sum(group.cpus * group.copies for group in groups) <= cpus - 0.5
    assert plan_groups(base, chain, [Node(2, 0)])[0].copies == 2
    assert plan_groups(base, chain, [Node(2, 0)] * 40)[0].copies == 80, "none across two nodes"
    assert plan_groups(base, chain, [Node(2, 0)] * 40, shards=3)[0].copies == 3
    from configs.load import load

    gpu = load(DatasetConfig, "configs/dataset/fgid.yaml", [])
    with pytest.raises(ConfigError, match="GPUs"):
        plan_groups(gpu, build_stages(gpu), [Node(8, 0)])
    groups = plan_groups(gpu, build_stages(gpu), [Node(16, 2)] * 2)
    assert [group.names for group in groups] == [
        ("resize", "detect"),
        ("parse", "embed"),
        ("caption",),
    ]
    assert sum(group.gpus * group.copies for group in groups) <= 4
