"""A long run that is killed and started again: `python -m bench.resume --count 10000`.

The command line makes a data set of synthetic portraits, each repeated with edits (crop, mirror,
brightness, JPEG quality). When a share of the inputs is committed the driver gets SIGKILL, and the
same command is run again. The output is the number of inputs that each run processed, the driver's
peak memory, and the result of lint. The exit status is 1 if a shard that was committed before the
kill is written again, or if an input is lost.
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

from bench.memory import peak
from pipelines.ledger import read_ledger
from pipelines.lint import lint
from stages.codec import Image, decode_jpeg, encode_jpeg
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.pipelines.helpers import stamps


@dataclass(frozen=True, slots=True)
class Start:
    """A run of the command. status: the exit status, -9 if killed. peak_mb: of the driver."""

    status: int
    seconds: float
    peak_mb: float


def main(
    count: Annotated[int, typer.Option(min=10, help="Images.")] = 10_000,
    people: Annotated[
        int, typer.Option(min=1, help="Portraits that the images are made of.")
    ] = 100,
    at: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="Share of inputs committed at the kill.")
    ] = 0.6,
    folder: Annotated[Path, typer.Option(help="Folder for images and output.")] = Path(
        "runs/resume"
    ),
    settings: Annotated[
        list[str] | None, typer.Argument(help="KEY=VALUE of the data set's configuration.")
    ] = None,
) -> None:
    """Kill a run, run the same command again, and count what the second run processed."""
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
        raise SystemExit(f"{output} holds a data set; remove it, or name another --folder")
    first = run(command, lambda: read_ledger(store).inputs >= at * count)
    time.sleep(10)  # until its workers have ended
    reader = DatasetReader(store)
    committed = {manifest.shard for manifest in reader.manifests().values()}
    stamps_before = {
        name: stamp for name, stamp in stamps(output).items() if Path(name).stem in committed
    }
    before = read_ledger(store).inputs
    print(
        f"killed after {first.seconds:.0f} s: {before:,} of {count:,} inputs committed in "
        f"{len(committed)} shards"
    )
    second = run(command, lambda: False)
    ledger, stamps_after = read_ledger(store), stamps(output)
    rewritten = [name for name, stamp in stamps_before.items() if stamps_after.get(name) != stamp]
    processed = sum(m.inputs for m in reader.manifests().values() if m.shard not in committed)
    print(
        f"the second run exited {second.status} after {second.seconds:.0f} s: it processed "
        f"{processed:,} inputs"
    )
    print(f"driver's peak: {first.peak_mb:.0f} MB, then {second.peak_mb:.0f} MB")
    print(
        f"{ledger.inputs:,} inputs = {ledger.written:,} written + {dict(ledger.dropped)} + "
        f"{dict(ledger.failed)}"
    )
    faults = [*lint(store), *(f"written again: {name}" for name in rewritten)]
    if second.status or before + processed != count or ledger.inputs != count:
        faults.append(f"{before:,} + {processed:,} inputs processed, expected {count:,}")
    print("\n".join(faults) or "no input lost, none processed twice, lint is clean")
    raise SystemExit(bool(faults))


def write_edits(folder: Path, portraits: Path, count: int, people: int) -> None:
    """Writes `count` edits of `people` synthetic portraits, except those that exist already."""
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
    # in another process, for the reason in tests/conftest.py
    subprocess.run([*command, str(portraits)], check=True)
    originals = [decode_jpeg(path.read_bytes()) for path in sorted(portraits.glob("*.jpg"))]
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        path = folder / f"{index:06d}.jpg"
        if not path.exists():
            path.write_bytes(
                edited(originals[index % len(originals)], np.random.default_rng([3, index]))
            )


def edited(image: Image, rng: np.random.Generator) -> bytes:
    """Returns a 640² JPEG of a random crop, mirrored or not, brighter or darker."""
    side = int(image.shape[0] * rng.uniform(0.9, 1.0))
    top, left = (int(rng.integers(0, image.shape[0] - side + 1)) for _ in range(2))
    part = image[top : top + side, left : left + side]
    part = part[:, ::-1] if rng.integers(2) else part
    small = cv2.resize(part, (640, 640), interpolation=cv2.INTER_AREA) * rng.uniform(0.8, 1.15)
    return encode_jpeg(small.clip(0, 255).astype(np.uint8), int(rng.integers(85, 96)))


def run(command: list[str], should_kill: Callable[[], bool]) -> Start:
    """Runs the command until it ends; sends it SIGKILL when `should_kill` returns True."""
    started, peak_mb = time.monotonic(), 0.0
    driver = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    while driver.poll() is None:
        peak_mb = max(peak_mb, peak(driver.pid))
        if should_kill():
            driver.send_signal(signal.SIGKILL)
            driver.wait()
        time.sleep(1)
    return Start(driver.returncode, time.monotonic() - started, peak_mb)


if __name__ == "__main__":
    typer.run(main)
