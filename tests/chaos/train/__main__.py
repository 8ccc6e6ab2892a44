"""Trains while processes are killed and stopped, the disk is full, checkpoints are damaged and the
number of processes changes: `make chaos-train`.

Each round starts the same command until it finishes. Something stops each start but the last, at a
random time that is drawn from a seed: SIGKILL of one of the training processes or of all processes,
SIGTERM to all, SIGINT to one, or a full disk, which later has room again. Between two starts, the
newest checkpoint may be damaged, and the number of processes (1, 2 or 4), the micro-batch and the
number of workers may change. At the end the samples of every step, the losses and the weights are
compared with those of an undisturbed run, and nothing may be left: no process, no partial folder,
no file in shared memory. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from tests.chaos.train.command import Command, Layout
from tests.chaos.train.inputs import PORTRAITS, make_preset
from tests.chaos.train.plans import MICRO, Plan, plan_round
from tests.chaos.train.rounds import Round, Undisturbed
from train.history import KEYS

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    rounds: Annotated[int, typer.Option(help="Rounds; each trains once.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the faults.")] = 0,
    first: Annotated[int, typer.Option(help="Number of the first round, to repeat one.")] = 1,
) -> None:
    """Train in spite of kills, signals, full disks and damage, and compare every bit."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    total, wrong, starts, began = Counter[str](), 0, 0, time.monotonic()
    try:
        print(f"a data set of {PORTRAITS} portraits, and a base model", flush=True)
        preset = make_preset(folder)
        references: dict[int, Undisturbed] = {}  # by number of processes
        for number in range(first, first + rounds):
            plan = plan_round(number - 1, seed)
            count = plan.starts[0].layout.processes if plan.same else 1
            if count not in references:
                references[count] = train_undisturbed(preset, folder, count, references)
            rng = random.Random(f"{seed}-{number}-times")
            played = Round(plan, rng, preset, folder / f"round-{number}", references[count])
            played.play()
            print(
                f"round {number}, {plan}: {_listed(played.events)}; {played.starts} starts, "
                f"{played.seconds:.0f} s; {'; '.join(played.wrong) or _equal(plan)}",
                flush=True,
            )
            total += played.events
            starts += played.starts
            wrong += bool(played.wrong)
        summary = {"rounds": rounds, "bad_rounds": wrong, "starts": starts}
        seconds = round(time.monotonic() - began)
        print(json.dumps({**summary, "seconds": seconds, "faults": dict(sorted(total.items()))}))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if wrong:
        raise SystemExit(1)


def train_undisturbed(
    preset: Path, folder: Path, count: int, others: dict[int, Undisturbed]
) -> Undisturbed:
    """Trains on `count` processes without faults. Raises RuntimeError if that fails, or if the
    samples of a step are not those of the other undisturbed runs.
    """
    began, output = time.monotonic(), folder / f"undisturbed-{count}"
    command = Command.of(preset, output, folder / f"files-{count}")
    training = command.start(Layout(processes=count, workers=1, micro=MICRO[count]))
    while training.is_running() and not command.last_step():
        time.sleep(0.1)
    startup = time.monotonic() - began
    if training.process.wait():
        raise RuntimeError(f"the undisturbed run failed: {training.text()[-2000:]}")
    for other in others.values():
        if (output / KEYS).read_text() != (other.output / KEYS).read_text():
            raise RuntimeError(f"{count} processes train on other samples than before")
    print(
        f"undisturbed, {count} process{'es' if count > 1 else ''}: {time.monotonic() - began:.0f} "
        f"s, of which {startup:.0f} s before the first step",
        flush=True,
    )
    return Undisturbed(output, startup)


def _listed(events: Counter[str]) -> str:
    return ", ".join(f"{kind} {n}" for kind, n in sorted(events.items())) or "no fault"


def _equal(plan: Plan) -> str:
    how = "bit-equal" if plan.same else "equal up to rounding"
    return f"samples equal, losses and weights {how}"


if __name__ == "__main__":
    app()
