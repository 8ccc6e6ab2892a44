"""Peak memory of planning a run over COUNT inputs: `python -m bench.planning 1000 1000000`.

Each COUNT is measured in its own process. The inputs are a list of URLs, which planning assigns to
shards but doesn't fetch. With `--again` the process then plans a second time, with the first plan
on disk, as a resumed run does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.memory import peak
from configs.schema import DatasetConfig, SourceConfig
from pipelines.planning.plan import make_plan, write_plan
from stages.storage.store import Store

COUNTS = (1_000, 10_000, 100_000, 1_000_000)


def measure_in_process(count: int, again: bool) -> dict[str, Any]:
    """Calls `measure` in a new process."""
    command = [
        sys.executable,
        "-m",
        "bench.planning",
        "--here",
        *(["--again"] if again else []),
        str(count),
    ]
    stdout = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    measured: dict[str, Any] = json.loads(stdout)
    return measured


def measure(count: int, again: bool) -> dict[str, Any]:
    """Plans `count` inputs; returns seconds and this process's peak resident MB.

    The peaks are those before planning, after it and, with `again`, after planning a second time.
    """
    with tempfile.TemporaryDirectory(prefix="planning-") as folder:
        urls = Path(folder) / "urls.txt"
        with urls.open("w") as stream:
            stream.writelines(
                f"https://pictures.example.org/{i % 997:03d}/portrait-{i:09d}.jpg\n"
                for i in range(count)
            )
        config = DatasetConfig(source=SourceConfig(path=str(urls)), output=f"{folder}/output")
        store, peaks, started = Store(config.output), [peak()], time.perf_counter()
        for _ in range(2 if again else 1):
            plan = make_plan(config, store)
            write_plan(plan, store)
            peaks.append(peak())
        seconds = time.perf_counter() - started
    assert plan.inputs == count and (plan.new == 0) == again, (
        "the second plan must reuse every input of the first"
    )
    names = ("start_mb", "planned_mb", "replanned_mb")
    return {"inputs": count, **dict(zip(names, peaks, strict=False)), "seconds": round(seconds, 1)}


def main(
    counts: Annotated[list[int] | None, typer.Argument(help="Numbers of inputs.")] = None,
    again: Annotated[bool, typer.Option(help="Plan a second time, as a resumed run does.")] = False,
    here: Annotated[
        bool, typer.Option(help="Measure one COUNT in this process and print a line of JSON.")
    ] = False,
) -> None:
    """Print a row for each count."""
    if here and counts:
        print(json.dumps(measure(counts[0], again)))
        return
    print("   inputs   peak MB of the driver: at start, planned, planned again   inputs/s")
    for count in counts or COUNTS:
        measured = measure_in_process(count, again)
        columns = "".join(
            f"{measured.get(name, '-'):>15}" for name in ("start_mb", "planned_mb", "replanned_mb")
        )
        rate = count * (2 if again else 1) / measured["seconds"]
        print(f"{count:>9,} {columns} {rate:>14,.0f}", flush=True)


if __name__ == "__main__":
    typer.run(main)
