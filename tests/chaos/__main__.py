"""Makes data sets while workers, actors, nodes and the driver are killed, files are damaged, and
the disk is full: `make chaos`.

Each round runs the pipeline on a Ray cluster of several nodes and sends SIGKILL to random processes
at random times, drawn from a seed. When the driver is killed, the same command is run again. In
each third round of five, a file of a committed shard is damaged before that; the run must refuse
it; in the end several files are damaged and repaired. In each fifth round the disk is full instead
of any kills, and later has room again. At the end the shards are compared byte by byte with those
of an undisturbed run, their keys are counted, and lint checks them. The exit status is 1 if
anything differs.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
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
from tests.chaos.cluster import ROOT, Cluster, kill, title_of
from tests.chaos.command import CLI, ENVIRONMENT, run_command, succeed
from tests.chaos.damage import Vandal
from tests.chaos.disk import SmallDisk, fill
from tests.pipelines.helpers import digests

_KINDS = ("worker", "actor", "actor", "node", "driver")
_ROUNDS = ("kills", "kills", "damage", "kills", "full disk")
_PAUSE = (0.5, 9.0)  # seconds between two kills
_LIMIT = 900.0  # seconds for a round; a longer one counts as hanging


@dataclass
class Round:
    """A round's result: kills and damages by kind, runs of the command, seconds, and faults."""

    kills: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


class Pauses:
    """Random times for kills."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._next = time.monotonic() + rng.uniform(*_PAUSE) + 5

    def is_due(self, output: Path) -> bool:
        """Returns whether it is time for a kill; then the next pause begins."""
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + self._rng.uniform(*_PAUSE)
        return True


app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    rounds: Annotated[int, typer.Option(help="Rounds; each makes a data set.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the kills.")] = 0,
    kills: Annotated[int, typer.Option(help="SIGKILLs in a round.")] = 5,
    count: Annotated[int, typer.Option(help="Portraits.")] = 36,
    nodes: Annotated[int, typer.Option(help="Nodes of the cluster, including its head.")] = 3,
) -> None:
    """Make data sets in spite of kills, damage and full disks, and compare every byte."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        print(f"{count} portraits and the poisoned set, undisturbed first", flush=True)
        photos = folder / "photos"
        succeed(["synthesize", "--count", str(count), "--seed", "11", "--poison", str(photos)])
        succeed(run_command(photos, folder / "undisturbed", "executor=inline"))
        expected = digests(folder / "undisturbed")
        total: Counter[str] = Counter()
        failed = 0
        with Cluster(nodes) as cluster:
            for number in range(rounds):
                output = folder / f"round-{number}"
                rng = random.Random(f"{seed}-{number}")
                kind = _ROUNDS[number % len(_ROUNDS)]
                if kind == "full disk":
                    result = play_full_disk(cluster, photos, output, rng, folder / "undisturbed")
                else:
                    vandal = Vandal(rng) if kind == "damage" else None
                    result = play(cluster, photos, output, rng, kills, vandal)
                    result.faults += compare(output, folder / "undisturbed", expected)
                events = ", ".join(f"{kind} {n}" for kind, n in sorted(result.kills.items()))
                print(
                    f"round {number + 1}/{rounds}, {kind}: {events}; {result.starts} starts, "
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


def play_full_disk(
    cluster: Cluster, photos: Path, output: Path, rng: random.Random, undisturbed: Path
) -> Round:
    """Runs the same command on a disk that is full, and has room at last."""
    result, started = Round(starts=3), time.monotonic()
    sizes = [path.stat().st_size for path in undisturbed.rglob("*") if path.is_file()]
    with SmallDisk(output, max(sizes)) as disk:
        on_cluster = ("executor=ray", f"ray.address={cluster.address}", "ray.workers=2")
        more = on_cluster if disk.is_mounted else ("executor=inline",)
        arguments = run_command(photos, output / "out", *more)
        result.faults += fill(arguments, disk, sum(sizes), rng)
        result.faults += compare(output / "out", undisturbed, digests(undisturbed))
    result.kills["disk full"] = 2
    result.seconds = time.monotonic() - started
    return result


def play(
    cluster: Cluster,
    photos: Path,
    output: Path,
    rng: random.Random,
    kills: int,
    vandal: Vandal | None = None,
) -> Round:
    """Runs the same command until it succeeds, and sends `kills` SIGKILLs meanwhile.

    vandal: damages files while no driver runs. Then only drivers are killed, when it is due.
    """
    result, started = Round(), time.monotonic()
    arguments = run_command(
        photos, output, "executor=ray", f"ray.address={cluster.address}", "ray.workers=2"
    )
    log = output.with_suffix(".log")
    driver = None
    times = vandal or Pauses(rng)
    while time.monotonic() - started < _LIMIT:
        if driver is None:
            result.starts += 1
            driver = start_driver(arguments, log)
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
            result.faults += vandal.strike(output, arguments) if vandal else []
            continue
        if result.kills.total() < kills and times.is_due(output):
            kind = "driver" if vandal else rng.choice(_KINDS)
            if kill_random(kind, cluster, driver, rng):
                result.kills[kind] += 1
        time.sleep(0.1)
    else:
        tail = log.read_text(errors="replace")[-600:]
        result.faults.append(f"not finished after {_LIMIT:.0f} s: {tail}")
    if driver is not None and driver.poll() is None:
        driver.kill()
        driver.wait()
    if vandal is not None:
        result.faults += vandal.finish(output, arguments)
        result.kills.update(vandal.done)
    result.seconds = time.monotonic() - started
    return result


def start_driver(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts the command line, which appends its output to `log`."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            [*CLI, *arguments], cwd=ROOT, env=ENVIRONMENT, stdout=stream, stderr=stream
        )


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
