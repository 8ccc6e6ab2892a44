"""`make chaos`: a data set is made again and again while workers, actors, nodes and the driver are
killed.

Each round runs the pipeline on a Ray cluster of several nodes and sends SIGKILL to seeded victims
at seeded moments. Where the driver is killed, the same command is given again. At the end every
byte of every shard is compared with those of an undisturbed run, every key is counted, and lint
reads all of it. Exits 1 if anything differs.
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
_LIMIT = 900.0  # seconds for a round; more is a hang


@dataclass
class Round:
    """What was done to a round, and what came of it."""

    kills: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    rounds: Annotated[int, typer.Option(help="Rounds, each a data set made whole.")] = 5,
    seed: Annotated[int, typer.Option(help="Of victims and moments.")] = 0,
    kills: Annotated[int, typer.Option(help="SIGKILLs in a round.")] = 5,
    count: Annotated[int, typer.Option(help="Portraits.")] = 36,
    nodes: Annotated[int, typer.Option(help="Nodes of the cluster, its head among them.")] = 3,
) -> None:
    """Kill what can be killed, and compare every byte."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        print(f"{count} portraits and the poisoned set, undisturbed first", flush=True)
        photos = folder / "photos"
        run_cli("synthesize", "--count", str(count), "--seed", "11", "--poison", str(photos))
        run_cli(*command(photos, folder / "undisturbed", "executor=inline"))
        expected = digests(folder / "undisturbed")
        total: Counter[str] = Counter()
        bad = 0
        with Cluster(nodes) as cluster:
            for number in range(rounds):
                output = folder / f"round-{number}"
                done = play(cluster, photos, output, random.Random(f"{seed}-{number}"), kills)
                done.faults += compare(output, folder / "undisturbed", expected)
                killed = ", ".join(f"{kind} {n}" for kind, n in sorted(done.kills.items()))
                print(
                    f"round {number + 1}/{rounds}: killed {killed}; {done.starts} starts, "
                    f"{done.seconds:.0f} s; "
                    f"{'; '.join(done.faults) or 'every byte as undisturbed'}",
                    flush=True,
                )
                total += done.kills
                bad += bool(done.faults)
                shutil.rmtree(output, ignore_errors=True)
        print(
            json.dumps({"rounds": rounds, "bad_rounds": bad, "kills": dict(sorted(total.items()))})
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if bad:
        raise SystemExit(1)


def command(photos: Path, output: Path, *more: str) -> list[str]:
    given = [f"source.path={photos}", f"output={output}", "shard_size=3", "threads=1", *more]
    return ["run", "--config", DEMO, *given]


def run_cli(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(arguments)} exited {done.returncode}:\n{done.stderr[-2000:]}"
        )


def play(cluster: Cluster, photos: Path, output: Path, dice: random.Random, kills: int) -> Round:
    """One round: the same command until it has ended well, and `kills` SIGKILLs on the way."""
    told, started = Round(), time.monotonic()
    given = command(
        photos, output, "executor=ray", f"ray.address={cluster.address}", "ray.workers=2"
    )
    log = output.with_suffix(".log")
    driver = None
    due = time.monotonic() + dice.uniform(*_PAUSE) + 5
    while time.monotonic() - started < _LIMIT:
        if driver is None:
            told.starts += 1
            with log.open("ab") as stream:
                driver = subprocess.Popen(
                    [sys.executable, "-m", "pipelines.cli", *given],
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
                told.faults.append(
                    f"the driver exited {code}: {log.read_text(errors='replace')[-600:]}"
                )
                break
            driver = None
            continue
        if told.kills.total() < kills and time.monotonic() >= due:
            kind = dice.choice(_KINDS)
            if strike(kind, cluster, driver, dice):
                told.kills[kind] += 1
            due = time.monotonic() + dice.uniform(*_PAUSE)
        time.sleep(0.1)
    else:
        told.faults.append(f"no end after {_LIMIT:.0f} s: {log.read_text(errors='replace')[-600:]}")
    if driver is not None and driver.poll() is None:
        driver.kill()
        driver.wait()
    told.seconds = time.monotonic() - started
    return told


def strike(
    kind: str, cluster: Cluster, driver: subprocess.Popen[bytes], dice: random.Random
) -> bool:
    """SIGKILL one victim of that kind; False if there is none at this moment."""
    if kind == "driver":
        driver.kill()
        driver.wait()
        return True
    if kind == "node":
        if not cluster.nodes:
            return False
        cluster.lose(dice.choice(cluster.nodes))
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
    return bool(victims) and kill(dice.choice(sorted(victims, key=lambda process: process.pid)))


def compare(output: Path, undisturbed: Path, expected: dict[str, str]) -> list[str]:
    """Whatever differs from the undisturbed run, as lines."""
    if not (output / "shards").is_dir():
        return ["nothing was written"]
    store, told = Store(str(output)), Store(str(undisturbed))
    found = digests(output)
    faults = [
        f"{name} differs"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    ]
    faults += list(lint(store))
    keys: Counter[str] = Counter()
    for manifest in DatasetReader(store).manifests().values():
        index = int(manifest.shard[5:])
        rows = DatasetReader(store).rows(index).to_pylist()
        keys.update(row["key"] for row in rows)
        if [r.key for r in DatasetReader(store).records(index)] != [row["key"] for row in rows]:
            faults.append(f"{manifest['shard']}: samples and rows disagree")
    wanted = read_ledger(told).inputs
    twice = sum(1 for n in keys.values() if n > 1)
    if len(keys) != wanted or twice:
        faults.append(f"{wanted - len(keys)} inputs lost, {twice} twice")
    left = [p.name for p in (output / "shards").iterdir() if ".tmp-" in p.name]
    return [*faults, *(f"left behind: {name}" for name in left)]


if __name__ == "__main__":
    app()
