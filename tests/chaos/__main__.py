"""Makes data sets while workers, actors, nodes and the driver are killed: `make chaos`.

Each round runs the pipeline on a Ray cluster of several nodes and sends SIGKILL to random processes
at random times, drawn from a seed. When the driver is killed, the same command is run again. At the
end the shards are compared byte by byte with those of an undisturbed run, their keys are counted,
and lint checks them. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from pipelines.ledger import read_ledger
from pipelines.lint import lint
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.chaos.cluster import ROOT, TOKEN, Cluster, kill, title_of
from tests.pipelines.helpers import DEMO, digests

_KINDS = ("worker", "actor", "actor", "node", "driver")
_PAUSE = (0.5, 9.0)  # seconds between two kills
_LIMIT = 900.0  # seconds for a round; a longer one counts as hanging


@dataclass
class Round:
    """A round's result: kills by kind, runs of the command, seconds, and faults."""

    kills: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    rounds: Annotated[int, typer.Option(help="Rounds; each makes a data set.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the kills.")] = 0,
    kills: Annotated[int, typer.Option(help="SIGKILLs in a round.")] = 5,
    count: Annotated[int, typer.Option(help="Portraits.")] = 36,
    nodes: Annotated[int, typer.Option(help="Nodes of the cluster, including its head.")] = 3,
) -> None:
    """Make data sets while processes are killed, and compare every byte."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        print(f"{count} portraits and the poisoned set, undisturbed first", flush=True)
        photos = folder / "photos"
        run_cli("synthesize", "--count", str(count), "--seed", "11", "--poison", str(photos))
        run_cli(*command(photos, folder / "undisturbed", "executor=inline"))
        expected = digests(folder / "undisturbed")
        total: Counter[str] = Counter()
        failed = 0
        with Cluster(nodes) as cluster:
            for number in range(rounds):
                output = folder / f"round-{number}"
                result = play(cluster, photos, output, random.Random(f"{seed}-{number}"), kills)
                result.faults += compare(output, folder / "undisturbed", expected)
                killed = ", ".join(f"{kind} {n}" for kind, n in sorted(result.kills.items()))
                print(
                    f"round {number + 1}/{rounds}: killed {killed}; {result.starts} starts, "
                    f"{result.seconds:.0f} s; "
                    f"{'; '.join(result.faults) or 'every byte equal to the undisturbed run'}",
                    flush=True,
                )
                total += result.kills
                failed += bool(result.faults)
                shutil.rmtree(output, ignore_errors=True)
        kills_by_kind = dict(sorted(total.items()))
        print(json.dumps({"rounds": rounds, "bad_rounds": failed, "kills": kills_by_kind}))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if failed:
        raise SystemExit(1)


def command(photos: Path, output: Path, *more: str) -> list[str]:
    """Returns the arguments of the command line that makes the data set."""
    settings = [f"source.path={photos}", f"output={output}", "shard_size=3", "threads=1", *more]
    return ["run", "--config", DEMO, *settings]


def run_cli(*arguments: str) -> None:
    """Runs the command line; raises RuntimeError if it fails."""
    process = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise RuntimeError(
            f"{' '.join(arguments)} exited {process.returncode}:\n{process.stderr[-2000:]}"
        )


def play(cluster: Cluster, photos: Path, output: Path, rng: random.Random, kills: int) -> Round:
    """Runs the same command until it succeeds, and sends `kills` SIGKILLs meanwhile."""
    result, started = Round(), time.monotonic()
    arguments = command(
        photos, output, "executor=ray", f"ray.address={cluster.address}", "ray.workers=2"
    )
    log = output.with_suffix(".log")
    driver = None
    next_kill = time.monotonic() + rng.uniform(*_PAUSE) + 5
    while time.monotonic() - started < _LIMIT:
        if driver is None:
            result.starts += 1
            with log.open("ab") as stream:
                driver = subprocess.Popen(
                    [sys.executable, "-m", "pipelines.cli", *arguments],
                    cwd=ROOT,
                    env={**os.environ, **TOKEN},
                    stdout=stream,
                    stderr=stream,
                )
        code = driver.poll()
        if code == 0:
            break
        if code is not None:
            if code > 0:
                result.faults.append(
                    f"the driver exited {code}: {log.read_text(errors='replace')[-600:]}"
                )
                break
            driver = None
            continue
        if result.kills.total() < kills and time.monotonic() >= next_kill:
            kind = rng.choice(_KINDS)
            if kill_random(kind, cluster, driver, rng):
                result.kills[kind] += 1
            next_kill = time.monotonic() + rng.uniform(*_PAUSE)
        time.sleep(0.1)
    else:
        tail = log.read_text(errors="replace")[-600:]
        result.faults.append(f"not finished after {_LIMIT:.0f} s: {tail}")
    if driver is not None and driver.poll() is None:
        driver.kill()
        driver.wait()
    result.seconds = time.monotonic() - started
    return result


def kill_random(
    kind: str, cluster: Cluster, driver: subprocess.Popen[bytes], rng: random.Random
) -> bool:
    """Sends SIGKILL to a random process or node of that kind; returns False if there is none."""
    if kind == "driver":
        driver.kill()
        driver.wait()
        return True
    if kind == "node":
        if not cluster.nodes:
            return False
        cluster.replace(rng.choice(cluster.nodes))
        return True
    running = [process for node in cluster.all() for process in node.workers()]
    actors = [
        process
        for process in running
        if "Actor" in title_of(process) or "_MapWorker" in title_of(process)
    ]
    victims = (
        actors if kind == "actor" else [process for process in running if process not in actors]
    )
    return bool(victims) and kill(rng.choice(sorted(victims, key=lambda process: process.pid)))


def compare(output: Path, undisturbed: Path, expected: dict[str, str]) -> list[str]:
    """Returns the differences from the undisturbed run, whose file digests are `expected`."""
    if not (output / "shards").is_dir():
        return ["nothing was written"]
    store, reader = Store(str(output)), DatasetReader(str(output))
    actual = digests(output)
    faults = [
        f"{name} differs"
        for name in sorted({*actual, *expected})
        if actual.get(name) != expected.get(name)
    ]
    faults += list(lint(store))
    keys: Counter[str] = Counter()
    for index, manifest in reader.manifests().items():
        row_keys = [row["key"] for row in reader.rows(index).to_pylist()]
        keys.update(row_keys)
        if [record.key for record in reader.records(index)] != row_keys:
            faults.append(f"{manifest.shard}: records and rows disagree")
    inputs = read_ledger(Store(str(undisturbed))).inputs
    repeated = sum(1 for n in keys.values() if n > 1)
    if len(keys) != inputs or repeated:
        faults.append(f"{inputs - len(keys)} inputs lost, {repeated} written more than once")
    temporary = [p.name for p in (output / "shards").iterdir() if ".tmp-" in p.name]
    return [*faults, *(f"temporary file: {name}" for name in temporary)]


if __name__ == "__main__":
    app()
