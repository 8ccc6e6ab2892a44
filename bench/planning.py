"""Peak memory of planning COUNT inputs, each COUNT in a process of its own: `python -m
bench.planning 1000 1000000`.

The inputs are a list of URLs, which planning names and places but never fetches. Each child plans
them and keeps the plan; with `--again` it then plans once more against the plan kept, as a run that
resumes does.
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

from configs.schema import DatasetConfig, SourceConfig
from pipelines.planning.plan import make_plan, write_plan
from stages.storage.store import Store

COUNTS = (1_000, 10_000, 100_000, 1_000_000)


def in_child(count: int, again: bool) -> dict[str, Any]:
    """What `measure` says of `count` inputs in a fresh process."""
    command = [
        sys.executable,
        "-m",
        "bench.planning",
        "--here",
        *(["--again"] if again else []),
        str(count),
    ]
    answer: dict[str, Any] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    return answer


def measure(count: int, again: bool) -> dict[str, Any]:
    """Peak resident MB of this process: before planning, after it, and after planning again;
    seconds of all that.
    """
    with tempfile.TemporaryDirectory(prefix="planning-") as folder:
        urls = Path(folder) / "urls.txt"
        with urls.open("w") as stream:
            stream.writelines(
                f"https://pictures.example.org/{i % 997:03d}/portrait-{i:09d}.jpg\n"
                for i in range(count)
            )
        config = DatasetConfig(source=SourceConfig(path=str(urls)), output=f"{folder}/output")
        store, peaks, began = Store(config.output), [peak()], time.perf_counter()
        for _ in range(2 if again else 1):
            plan = make_plan(config, store)
            write_plan(plan, store)
            peaks.append(peak())
        seconds = time.perf_counter() - began
    assert plan.inputs == count and (plan.new == 0) == again, (
        "the second plan finds every input of the first"
    )
    names = ("start_mb", "planned_mb", "replanned_mb")
    return {"inputs": count, **dict(zip(names, peaks, strict=False)), "seconds": round(seconds, 1)}


def peak(pid: int | str = "self") -> float:
    """Peak resident MB; 0.0 of a process that has ended. Of its program alone: getrusage would
    count what its parent held when it forked.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0.0
    return round(
        next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0) / 1024, 1
    )


def main(
    counts: Annotated[list[int] | None, typer.Argument(help="How many inputs.")] = None,
    again: Annotated[
        bool, typer.Option(help="Plan a second time, as a run that resumes does.")
    ] = False,
    here: Annotated[
        bool, typer.Option(help="Measure this process: one COUNT, one line of JSON.")
    ] = False,
) -> None:
    """Print a row for each count."""
    if here and counts:
        print(json.dumps(measure(counts[0], again)))
        return
    print("   inputs   peak MB of the driver: at start, planned, planned again   inputs/s")
    for count in counts or COUNTS:
        found = in_child(count, again)
        columns = "".join(
            f"{found.get(name, '-'):>15}" for name in ("start_mb", "planned_mb", "replanned_mb")
        )
        rate = count * (2 if again else 1) / found["seconds"]
        print(f"{count:>9,} {columns} {rate:>14,.0f}", flush=True)


if __name__ == "__main__":
    typer.run(main)
