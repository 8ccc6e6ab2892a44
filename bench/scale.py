"""Scaling of the Ray executor, simulated on one machine; memory of planning: `make bench-scale`.

Executor, cluster nodes, shards and commit are real. The stages sleep as long as the real ones were
measured to compute (bench/chains.py); that takes no CPU, so many workers fit on a small machine. So
the benchmark measures the engine's part: whether shards get to the workers and are committed as
fast as they are made. It does not measure the networks, disks and models of a real cluster.

The steady rate is that from the moment when as many shards as there are workers have started to the
moment when the last shard starts. A worker that waits for a shard in between lowers it.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from bench import planning
from bench.chains import SECONDS, sleeping
from configs.load import load
from configs.schema import DatasetConfig
from pipelines.run import execute, plan_job
from stages.storage.manifest import Manifest
from tests.chaos.cluster import TOKEN, Cluster

# Enough for 44 workers of 0.75 CPUs with their read and write tasks.
NODES, NODE_CPUS = 4, 9


@dataclass(frozen=True, slots=True)
class Rate:
    """Images/s of a run. steady: while all workers were busy, for `seconds`. overall: in all."""

    workers: int
    steady: float
    seconds: float
    overall: float


def main(
    workers: Annotated[
        list[int] | None, typer.Argument(help="Numbers of workers, at most 32.")
    ] = None,
    images: Annotated[
        int,
        typer.Option(
            help="Images in a shard, a third of a second each. A shard must take longer than "
            "start-up."
        ),
    ] = 80,
    rounds: Annotated[int, typer.Option(min=2, help="Shards for each worker.")] = 3,
    plan: Annotated[bool, typer.Option(help="Also measure the driver's memory.")] = True,
) -> None:
    """Print images/s for each number of workers, then the driver's memory while it plans."""
    started = time.monotonic()
    rates = simulate(workers or [1, 8, 32], images, rounds)
    first = rates[0].steady / rates[0].workers
    print(
        json.dumps(
            {"efficiency": {r.workers: round(r.steady / r.workers / first, 3) for r in rates}}
        ),
        flush=True,
    )
    if plan:
        planning.main()
    print(f"{time.monotonic() - started:.0f} s in all")


def simulate(workers: Sequence[int], images: int, rounds: int) -> list[Rate]:
    """Makes a data set with each number of workers, on the same cluster."""
    os.environ.update(TOKEN)
    logging.getLogger("ray").setLevel(logging.ERROR)
    rates: list[Rate] = []
    print(
        f"stages sleep {sum(SECONDS.values()) * 1000:.0f} ms an image; {images} images a shard, "
        f"{rounds} shards a worker"
    )
    print("workers   images/s   of linear   measured over   images/s of the whole run", flush=True)
    with tempfile.TemporaryDirectory(prefix="scale-") as folder, Cluster(1, NODE_CPUS) as cluster:
        add_nodes(cluster, NODES - 1)
        for count in workers:
            rate = run(Path(folder), cluster.address, count, images, rounds)
            rates.append(rate)
            share = rate.steady / rate.workers / (rates[0].steady / rates[0].workers)
            print(
                f"{count:7} {rate.steady:10.2f} {share:11.3f} {rate.seconds:13.1f} s "
                f"{rate.overall:18.2f}",
                flush=True,
            )
    return rates


def run(folder: Path, address: str, workers: int, images: int, rounds: int) -> Rate:
    """Makes a data set with `workers` workers."""
    photos = folder / f"photos-{workers}"
    photos.mkdir()
    total = workers * images * rounds
    for index in range(total):
        (photos / f"{index:06d}.jpg").write_bytes(b"%d" % index)
    overrides = [
        f"source.path={photos}",
        f"output={folder / f'output-{workers}'}",
        f"shard_size={images}",
        "executor=ray",
        f"ray.address={address}",
        f"ray.workers={workers}",
        "source.find_copies=false",
        "global_pass.max_similarity=0",  # all samples of this chain have the same identity
    ]
    config = load(DatasetConfig, "configs/dataset/demo.yaml", overrides)
    started = time.monotonic()
    manifests = list(execute(plan_job(config, chain=sleeping), lambda count: None))
    overall = total / (time.monotonic() - started)
    steady, seconds = steady_rate(manifests, workers)
    return Rate(workers, steady, seconds, overall)


def steady_rate(manifests: Sequence[Manifest], workers: int) -> tuple[float, float]:
    """Returns images/s while all workers were busy, and the number of seconds of that."""
    spans = []
    for manifest in manifests:
        started = manifest.run.finished - manifest.run.seconds
        busy = sum(value for name, value in manifest.run.stage_seconds.items() if name != "source")
        spans.append((started, started + busy, manifest.inputs))
    spans.sort()
    start, end = spans[workers - 1][0], spans[-1][0]
    images = sum(n * max(0.0, min(b, end) - max(a, start)) / (b - a) for a, b, n in spans)
    return images / (end - start), end - start


def add_nodes(cluster: Cluster, count: int) -> None:
    """Starts nodes one after another; on a slow machine, nodes that start together time out.

    Raises TimeoutError if a node doesn't join within a minute.
    """
    import ray

    ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    for number in range(2, count + 2):
        cluster.add()
        end = time.monotonic() + 60
        while sum(node["Alive"] for node in ray.nodes()) < number:
            if time.monotonic() > end:
                raise TimeoutError(f"node {number} hasn't joined the cluster in a minute")
            time.sleep(0.2)
    ray.shutdown()


if __name__ == "__main__":
    typer.run(main)
