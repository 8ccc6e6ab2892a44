"""Compares the pipeline with other programs: `make bench ARGS="--against reference"`.

`--against img2dataset` compares download, resize and shard writing only.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from bench.chains import resizing
from bench.environments import installed
from bench.reference_loop import ReferenceLoop
from configs.load import load
from configs.schema import DatasetConfig
from pipelines.chain import Chain, build_chain
from pipelines.ledger import read_ledger
from pipelines.run import execute, plan_job
from stages.backends.bisenet import BiSeNetParser
from stages.backends.runtime import pin_threads
from stages.backends.weights import Weights
from stages.base import run_chain
from stages.chain import build_stages
from stages.codec import decode_jpeg
from stages.record import Record, key_of
from stages.storage.store import Store

# Images of the short runs. Their cost, mostly start-up, is subtracted from that of the long runs.
_SHORT_RUN = 96


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds, and CPU-seconds of this process and of its children that have ended."""

    seconds: float
    cpu: float


def cost_of(function: Callable[[], object]) -> Cost:
    """Calls a function and returns what it cost."""
    started, cpu_before = time.perf_counter(), _cpu()
    function()
    return Cost(time.perf_counter() - started, _cpu() - cpu_before)


def cores() -> int:
    """Returns the number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


def make_dataset(config: DatasetConfig, chain: Chain = build_chain) -> int:
    """Makes a data set from the beginning and returns the number of samples written."""
    shutil.rmtree(config.output, ignore_errors=True)
    list(execute(plan_job(config, chain=chain), lambda count: None))
    return read_ledger(Store(config.output)).written


def against_reference(
    config: DatasetConfig, files: Sequence[Path], folder: Path, rounds: int
) -> None:
    """Compares the inline pipeline with a loop like the reference's, in turns.

    The pipeline runs with parsing in float32 and in bfloat16. Prints their agreement, and a table
    of the costs.
    """
    shares = agreement(config, files[:64])
    print(
        f"parsing in bfloat16 agrees with float32 on {np.mean(shares):.4%} of the pixels of "
        f"{len(shares)} portraits (lowest of a portrait: {min(shares):.4%})",
        flush=True,
    )
    bfloat16 = replace(config, parse=replace(config.parse, dtype="bfloat16"))
    identities: dict[str, int] = {}
    costs: dict[str, list[Cost]] = {"reference": [], "float32": [], "bfloat16": []}

    def loop() -> None:
        shutil.rmtree(folder / "reference", ignore_errors=True)
        counts = ReferenceLoop(config).run(files, folder / "reference")
        identities["reference"] = counts["identities"]

    def pipeline(name: str, settings: DatasetConfig) -> Callable[[], None]:
        def run() -> None:
            identities[name] = make_dataset(settings)

        return run

    shutil.rmtree(config.output, ignore_errors=True)
    planned = plan_job(config).plan.inputs
    assert planned == len(files), f"the pipeline plans {planned} images, the loop {len(files)}"
    for _ in range(rounds):
        costs["float32"].append(cost_of(pipeline("float32", config)))
        costs["reference"].append(cost_of(loop))
        costs["bfloat16"].append(cost_of(pipeline("bfloat16", bfloat16)))
    _print_table(costs, len(files), "reference")
    counts = ", ".join(f"{name} {count}" for name, count in identities.items())
    print(f"images with an identity: {counts} of {len(files)}")


def agreement(config: DatasetConfig, files: Sequence[Path]) -> list[float]:
    """Returns for each image the share of pixels with equal labels in float32 and bfloat16."""
    pin_threads(config.threads)
    weights = Weights(config.weights)
    float32, bfloat16 = (
        BiSeNetParser(replace(config.parse, dtype=dtype), weights)
        for dtype in ("float32", "bfloat16")
    )
    records = [Record(key=key_of(p.name), source=p.name, image=p.read_bytes()) for p in files]
    images = [decode_jpeg(r.image) for r in run_chain(build_stages(config)[:1], records)]
    return [
        float((float32.parse([image])[0] == bfloat16.parse([image])[0]).mean()) for image in images
    ]


def against_img2dataset(files: Sequence[Path], folder: Path, rounds: int, count: int) -> None:
    """Compares the resize stage and the shards' commit with img2dataset, on one core each.

    Both download from the same local server. The cost of an image is the difference between a run
    over `count` images and a short one, so that start-up and imports don't count.
    """
    program = install(folder / "img2dataset")
    costs: dict[str, list[Cost]] = {"img2dataset": [], "ours": []}
    with serving(files[0].parent) as address:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        lists = {n: _url_list(folder, address, files, n) for n in (_SHORT_RUN, count)}
        runs: dict[str, Callable[..., object]] = {
            "ours": _resize,
            "img2dataset": partial(_img2dataset, program),
        }
        for _ in range(rounds):
            for name, run in runs.items():
                short, long = (
                    cost_of(partial(run, folder, lists[n], n)) for n in (_SHORT_RUN, count)
                )
                costs[name].append(Cost(long.seconds - short.seconds, long.cpu - short.cpu))
    _print_table(costs, count - _SHORT_RUN, "img2dataset")


def install(folder: Path) -> Path:
    """Installs img2dataset in its own virtual environment and returns the path of its program.

    Raises SystemExit if the configured package index doesn't have it.
    """
    try:
        python = installed(folder, ["img2dataset"])
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            "img2dataset can't be installed from the configured package index. "
            f"Configure one that has it.\n{error.stderr}"
        ) from error
    uv = Path(sys.executable).with_name("uv")
    listed = subprocess.run(
        [uv, "pip", "list", "--python", python, "--format", "json"], check=True, capture_output=True
    )
    versions = {row["name"]: row["version"] for row in json.loads(listed.stdout)}
    packages = ("img2dataset", "opencv-python-headless", "albumentations", "webdataset")
    print(", ".join(f"{name} {versions.get(name, '?')}" for name in packages), flush=True)
    return folder / "bin" / "img2dataset"


def _resize(folder: Path, urls: Path, count: int) -> None:
    """Runs the pipeline with the resize stage alone."""
    overrides = [
        f"source.path={urls}",
        "source.kind=urls",
        "source.allow_private=true",
        f"output={folder / 'resized'}",
        "shard_size=500",
        "executor=inline",
        "threads=1",
    ]
    written = make_dataset(load(DatasetConfig, "configs/dataset/demo.yaml", overrides), resizing)
    assert written == count, f"{written} of {count} images were written"


def _img2dataset(program: Path, folder: Path, urls: Path, count: int) -> None:
    output = folder / "img2dataset-output"
    shutil.rmtree(output, ignore_errors=True)
    options = {
        "url_list": urls,
        "input_format": "txt",
        "output_folder": output,
        "output_format": "webdataset",
        "image_size": 512,
        "resize_mode": "keep_ratio",
        "encode_quality": 95,
        "number_sample_per_shard": 500,
        "processes_count": 1,
        "thread_count": 32,
    }
    command = [str(program), *(f"--{name}={value}" for name, value in options.items())]
    subprocess.run(
        command,
        check=True,
        capture_output=True,
        env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"},
    )
    written = sum(json.loads(path.read_text())["successes"] for path in output.glob("*_stats.json"))
    assert written == count, f"{written} of {count} images were written"


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serves a folder over HTTP on loopback from another process; yields the URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "http.server",
        "--bind",
        "127.0.0.1",
        "--directory",
        str(folder),
        str(port),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def _url_list(folder: Path, address: str, files: Sequence[Path], count: int) -> Path:
    path = folder / f"urls-{count}.txt"
    path.write_text(
        "".join(f"{address}/{files[i % len(files)].name}?n={i}\n" for i in range(count))
    )
    return path


def _print_table(costs: dict[str, list[Cost]], images: int, other: str) -> None:
    """Prints the medians over all turns, and ratios to `other`; above 1 is faster than it."""
    base = [(c.seconds, c.cpu) for c in costs[other]]
    print(
        f"{images} images, {len(base)} turns          images/s   CPU-ms an image   images/s, "
        "ratio   CPU, ratio"
    )
    for name, turns in costs.items():
        seconds, cpu = median(c.seconds for c in turns), median(c.cpu for c in turns)
        speed_ratio = median(b[0] / c.seconds for b, c in zip(base, turns, strict=True))
        cpu_ratio = median(b[1] / c.cpu for b, c in zip(base, turns, strict=True))
        print(
            f"  {name:24} {images / seconds:14.2f} {cpu / images * 1000:17.1f} "
            f"{speed_ratio:17.2f} {cpu_ratio:12.2f}"
        )


def _cpu() -> float:
    """Returns the CPU-seconds of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)
