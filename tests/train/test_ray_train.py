"""Training on a Ray cluster of two nodes, whose workers are killed, stopped, or can't start.

The driver is this process. All tests of this file share the cluster.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from configs.errors import ConfigError
from configs.load import dump
from configs.ray_train import RayTrainConfig
from configs.schema import RayConfig
from stages.executors.cluster import list_nodes, ray_cluster
from stages.executors.placement import Resources
from stages.storage.lock import RunLock
from stages.storage.store import Store
from tests.chaos.cluster import Cluster, kill, title_of
from tests.train.helpers import small
from train.checkpoints import checkpoints
from train.cli import app
from train.history import read_lines
from train.ray_train import count_workers


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(2, cpus=1) as cluster:
        with ray_cluster(RayConfig(address=cluster.address)):
            while len(list_nodes()) < 2:
                time.sleep(0.2)
        yield cluster


@pytest.fixture
def train(cluster: Cluster, data: Path, tiny_base: Path, tmp_path: Path) -> Callable[..., Result]:
    """Runs the command on the cluster, with the settings of `two_processes`."""
    dump(small(data, tiny_base, tmp_path / "out"), tmp_path / "preset.yaml")
    settings = [
        "threads=1",
        "checkpointing_steps=5",
        "ray.gpus=0",
        f"ray.address={cluster.address}",
    ]

    def run(*more: str) -> Result:
        command = ["run", "--config", str(tmp_path / "preset.yaml"), *settings, *more]
        return CliRunner().invoke(app, command)

    return run


@contextmanager
def at_once(path: Path, act: Callable[[], object]) -> Iterator[None]:
    """Calls `act` in a thread as soon as the file exists."""
    left = threading.Event()

    def wait() -> None:
        while not path.exists():
            if left.wait(0.01):
                return
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.thorough
def test_a_worker_that_is_killed_costs_nothing_but_time(
    cluster: Cluster, train: Callable[..., Result], tmp_path: Path
) -> None:
    output, killed = tmp_path / "out", []

    def kill_one() -> None:
        (node,) = cluster.nodes
        killed.extend(p for p in node.workers() if "RayTrainWorker" in title_of(p) and kill(p))

    with at_once(output / "checkpoint-000005", kill_one):
        result = train("ray.workers=2", "max_train_steps=30")
    assert result.exit_code == 0, result.output
    assert len(killed) == 1
    assert result.stderr.count("2 samples a step = 2 processes × 1, on cpu") == 2
    assert re.search(r"worker \d died; all workers start again .*1 of at most 3", result.stderr)
    assert re.search(r"resuming from .*checkpoint-0000\d\d at step", result.stderr)
    assert "30 steps" in result.stdout and "adapter in" in result.stdout
    # The same micro-batches one after another, in this process: their gradients add up to those of
    # two processes, to the last bit.
    alone = tmp_path / "alone"
    settings = ["ray.address=", "micro_batch_size=1", "max_train_steps=30"]
    assert train(*settings, f"output={alone}").exit_code == 0
    for folder in ("final", "checkpoint-000030"):
        weights, undisturbed = (
            load_file(run / folder / "adapter.safetensors") for run in (output, alone)
        )
        assert weights.keys() == undisturbed.keys()
        assert all(torch.equal(weights[name], undisturbed[name]) for name in weights)
    lines = [[*read_lines(run / "losses.jsonl")] for run in (output, alone)]
    assert lines[0] == lines[1] and len(lines[0]) == 30


@pytest.mark.thorough
def test_a_signal_to_the_driver_writes_a_checkpoint(
    train: Callable[..., Result], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with at_once(output / "losses.jsonl", lambda: os.kill(os.getpid(), signal.SIGTERM)):
        result = train("ray.workers=1", "max_train_steps=4000", "checkpointing_steps=4000")
    assert result.exit_code == 128 + signal.SIGTERM, result.output
    (step,) = re.findall(r"stopped after step (\d+); the same command resumes", result.stderr)
    assert [path.name for path in checkpoints(output)] == [f"checkpoint-{int(step):06d}"]
    assert not (output / "final").exists()


@pytest.mark.thorough
def test_a_users_error_in_a_worker_ends_the_run_at_once(
    train: Callable[..., Result], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with RunLock(Store(str(output))):
        result = train("ray.workers=1")
    assert result.exit_code == 2
    *_, line = result.stderr.splitlines()
    assert re.match(r"error: .*is being written by process .*\(worker 0 on ", line)
    assert "start again" not in result.stderr and "Traceback" not in result.output


def test_a_cluster_that_is_too_small_is_refused_with_what_it_has() -> None:
    settings = RayTrainConfig(address="auto", workers=4)
    nodes = [Resources(8, 2), Resources(8, 1)]
    with pytest.raises(ConfigError, match=r"room for 3 of 4 .*8 CPUs, 2 GPUs; 8 CPUs, 1 GPUs"):
        count_workers(settings, nodes)
    assert count_workers(replace(settings, workers=0), nodes) == 3
    assert count_workers(replace(settings, workers=0, gpus=0, cpus=3), nodes) == 4
    with pytest.raises(ConfigError, match=r"room for 0 of 1 .*ray.gpus=0"):
        count_workers(replace(settings, workers=0), [Resources(8, 0)])
