"""How the Ray executor scales, simulated on this machine, and what planning costs its driver: `make
bench-scale`.

The executor, the cluster of several nodes, the shards and their commit are the real ones; the
stages wait as long as the real ones were measured to compute (bench/chains.py), which takes no CPU,
so that a small machine can hold many workers. What is simulated is the engine's own share: whether
shards reach the workers and leave them as fast as they are made. Networks, disks and models of a
real cluster are not.

Counted is the work done while all workers are up: from the moment when as many shards as there are
workers have been begun, to the moment when the last shard is begun. A worker that waits for its
next shard in between counts against it.
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
from typing import Annotated, Any

import typer

from bench import planning
from bench.chains import SECONDS, sleeping
from configs.load import load
from configs.schema import DatasetConfig
from pipelines.run import execute, plan_job
from tests.chaos.cluster import TOKEN, Cluster

# room for 44 workers of 0.75 CPU, with the read and write tasks beside them
NODES, NODE_CPUS = 4, 9


@dataclass(frozen=True, slots=True)
class Rate:
    """Of one run. steady: images/s while all workers were up, over `seconds`; whole: start-up and
    end included.
    """

    workers: int
    steady: float
    seconds: float
    whole: float


def main(
    workers: Annotated[list[int] | None, typer.Argument(help="How many, at most 32.")] = None,
    images: Annotated[
        int, typer.Option(help="Of a shard, a third of a second each: it must outlast start-up.")
    ] = 80,
    rounds: Annotated[int, typer.Option(min=2, help="Shards for each worker.")] = 3,
    plan: Annotated[bool, typer.Option(help="Measure the driver's memory too.")] = True,
) -> None:
    """Print images/s for each number of workers against linear, then the driver's memory while it
    plans.
    """
    began = time.monotonic()
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
    print(f"{time.monotonic() - began:.0f} s in all")


def simulate(workers: Sequence[int], images: int, rounds: int) -> list[Rate]:
    """A run for each number of workers, on one cluster."""
    os.environ.update(TOKEN)
    logging.getLogger("ray").setLevel(logging.ERROR)
    rates: list[Rate] = []
    print(
        f"stages wait {sum(SECONDS.values()) * 1000:.0f} ms an image; {images} images a shard, "
        f"{rounds} a worker"
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
                f"{rate.whole:18.2f}",
                flush=True,
            )
    return rates


def run(folder: Path, address: str, workers: int, images: int, rounds: int) -> Rate:
    """One data set, made by that many workers."""
    photos = folder / f"photos-{workers}"
    photos.mkdir()
    total = workers * images * rounds
    for index in range(total):
        (photos / f"{index:06d}.jpg").write_bytes(b"%d" % index)
    given = [
        f"source.path={photos}",
        f"output={folder / f'output-{workers}'}",
        f"shard_size={images}",
        "executor=ray",
    ]
    given += [f"ray.address={address}", f"ray.workers={workers}", "source.find_copies=false"]
    given += ["global_pass.max_similarity=0"]  # the chain gives everyone the same identity
    config = load(DatasetConfig, "configs/dataset/demo.yaml", given)
    began = time.monotonic()
    done = list(execute(plan_job(config, chain=sleeping), lambda count: None))
    whole = total / (time.monotonic() - began)
    steady, seconds = steady_rate(done, workers)
    return Rate(workers, steady, seconds, whole)


def steady_rate(done: Sequence[dict[str, Any]], workers: int) -> tuple[float, float]:
    """Images/s of the stages while all `workers` were up, and for how many seconds that was."""
    spans = []
    for manifest in done:
        started = manifest.run.finished - manifest.run.seconds
        busy = sum(value for name, value in manifest.run.stage_seconds.items() if name != "source")
        spans.append((started, started + busy, manifest.inputs))
    spans.sort()
    start, end = spans[workers - 1][0], spans[-1][0]
    made = sum(n * max(0.0, min(b, end) - max(a, start)) / (b - a) for a, b, n in spans)
    return made / (end - start), end - start


def add_nodes(cluster: Cluster, count: int) -> None:
    """One after another: a slow machine lets those that start at once time out. Raises TimeoutError
    if one fails to.
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
