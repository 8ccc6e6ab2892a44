"""A long run, killed on the way and started again: `python -m bench.resume --count 10000`.

Synthetic portraits, each repeated with edits (crop, mirror, brightness, JPEG quality), are made
into a data set by the command line. Once a share of them is committed the driver gets SIGKILL, and
the same command is given again. Printed are how many inputs each start worked on, the driver's peak
memory, and what lint says. It exits 1 where a shard that was committed before the kill is written
again, or anything is lost.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import typer

from bench.planning import peak
from pipelines.ledger import read_ledger
from pipelines.lint import lint
from stages.codec import Image, decode_jpeg, encode_jpeg
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.pipelines.helpers import stamps


@dataclass(frozen=True, slots=True)
class Start:
    """One start of the command: exit status (-9 where it was killed), seconds, peak resident MB of
    the driver.
    """

    status: int
    seconds: float
    peak_mb: float


def main(
    count: Annotated[int, typer.Option(min=10, help="Pictures.")] = 10_000,
    people: Annotated[int, typer.Option(min=1, help="Portraits that they are edits of.")] = 100,
    at: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="Share committed at the kill.")
    ] = 0.6,
    folder: Annotated[Path, typer.Option(help="Where pictures and output go.")] = Path(
        "runs/resume"
    ),
    settings: Annotated[
        list[str] | None, typer.Argument(help="KEY=VALUE of the data set's configuration.")
    ] = None,
) -> None:
    """Kill a run at a share of its inputs, run it again, and count what the second start worked on."""
    photos, output = folder / f"photos-{count}", folder / "dataset"
    write_edits(photos, folder / "portraits", count, people)
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "run",
        "--config",
        "configs/dataset/demo.yaml",
    ]
    command += [f"source.path={photos}", f"output={output}", "shard_size=100", *(settings or [])]
    store = Store(str(output))
    if store.names("shards"):
        raise SystemExit(f"{output} holds a data set: remove it, or give another --folder")
    first = run(command, lambda: read_ledger(store).inputs >= at * count)
    time.sleep(10)  # its workers live on for a moment
    whole = {manifest.shard for manifest in DatasetReader(store).manifests().values()}
    kept = {name: stamp for name, stamp in stamps(output).items() if Path(name).stem in whole}
    before = read_ledger(store).inputs
    print(
        f"killed after {first.seconds:.0f} s: {before:,} of {count:,} inputs committed in "
        f"{len(whole)} shards"
    )
    second = run(command, lambda: False)
    ledger, now = read_ledger(store), stamps(output)
    again = [name for name, stamp in kept.items() if now.get(name) != stamp]
    done = sum(m.inputs for m in DatasetReader(store).manifests().values() if m.shard not in whole)
    print(
        f"the second start ended {second.status} after {second.seconds:.0f} s: it worked on "
        f"{done:,}"
    )
    print(f"driver's peak: {first.peak_mb:.0f} MB, then {second.peak_mb:.0f} MB")
    print(
        f"{ledger.inputs:,} inputs = {ledger.written:,} written + {dict(ledger.dropped)} + "
        f"{dict(ledger.failed)}"
    )
    faults = [*lint(store), *(f"written again: {name}" for name in again)]
    if second.status or before + done != count or ledger.inputs != count:
        faults.append(f"{before:,} + {done:,} inputs for {count:,}")
    print("\n".join(faults) or "nothing lost, nothing done twice, lint finds nothing")
    raise SystemExit(bool(faults))


def write_edits(folder: Path, portraits: Path, count: int, people: int) -> None:
    """`count` edits of `people` synthetic portraits; those that are there already stay."""
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "synthesize",
        "--count",
        str(people),
        "--seed",
        "3",
    ]
    # a process of its own: see tests/conftest.py
    subprocess.run([*command, str(portraits)], check=True)
    originals = [decode_jpeg(path.read_bytes()) for path in sorted(portraits.glob("*.jpg"))]
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        path = folder / f"{index:06d}.jpg"
        if not path.exists():
            path.write_bytes(
                edited(originals[index % len(originals)], np.random.default_rng([3, index]))
            )


def edited(image: Image, dice: np.random.Generator) -> bytes:
    """A 640² JPEG of a part of `image`, perhaps mirrored, brighter or darker."""
    side = int(image.shape[0] * dice.uniform(0.9, 1.0))
    top, left = (int(dice.integers(0, image.shape[0] - side + 1)) for _ in range(2))
    part = image[top : top + side, left : left + side]
    part = part[:, ::-1] if dice.integers(2) else part
    small = cv2.resize(part, (640, 640), interpolation=cv2.INTER_AREA) * dice.uniform(0.8, 1.15)
    return encode_jpeg(small.clip(0, 255).astype(np.uint8), int(dice.integers(85, 96)))


def run(command: list[str], enough: Callable[[], bool]) -> Start:
    """The command, until it ends or there is `enough`, when it gets SIGKILL."""
    began, most = time.monotonic(), 0.0
    driver = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    while driver.poll() is None:
        most = max(most, peak(driver.pid))
        if enough():
            driver.send_signal(signal.SIGKILL)
            driver.wait()
        time.sleep(1)
    return Start(driver.returncode, time.monotonic() - began, most)


if __name__ == "__main__":
    typer.run(main)
