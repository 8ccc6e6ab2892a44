"""The pipeline beside others that do the same work: `make bench ARGS="--against reference"` or
`img2dataset`.
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
from pathlib import Path
from statistics import median

import numpy as np

from bench.chains import resizing
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

# URLs of the short runs, whose cost is taken off that of the long ones: start-up, imports
_FEW = 96


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds, and CPU-seconds of this process and of its children that have ended."""

    seconds: float
    cpu: float


def cost_of(work: Callable[[], object]) -> Cost:
    began, before = time.perf_counter(), _cpu()
    work()
    return Cost(time.perf_counter() - began, _cpu() - before)


def cores() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


def make(config: DatasetConfig, chain: Chain = build_chain) -> int:
    """The data set from nothing; how many samples were written."""
    shutil.rmtree(config.output, ignore_errors=True)
    list(execute(plan_job(config, chain=chain), lambda count: None))
    return read_ledger(Store(config.output)).written


# -------------------------------------------------------------------------------------------------


def against_reference(
    config: DatasetConfig, files: Sequence[Path], folder: Path, rounds: int
) -> None:
    """The inline pipeline, in float32 and with parsing under bfloat16, in turns with a loop such as
    the reference's.
    """
    share = agreement(config, files[:64])
    print(
        f"parsing under bfloat16 agrees with float32 on {np.mean(share):.4%} of the pixels of "
        f"{len(share)} portraits"
    )
    print(f"  (least of a portrait {min(share):.4%})", flush=True)
    low = replace(config, parse=replace(config.parse, dtype="bfloat16"))
    made: dict[str, int] = {}
    costs: dict[str, list[Cost]] = {"reference": [], "float32": [], "bfloat16": []}

    def loop() -> None:
        shutil.rmtree(folder / "reference", ignore_errors=True)
        made["reference"] = ReferenceLoop(config).run(files, folder / "reference")["identities"]

    def pipeline(name: str, given: DatasetConfig) -> Callable[[], None]:
        def work() -> None:
            made[name] = make(given)

        return work

    shutil.rmtree(config.output, ignore_errors=True)
    planned = plan_job(config).plan.inputs
    assert planned == len(files), (
        f"the pipeline would take {planned} pictures, the loop {len(files)}"
    )
    for _ in range(rounds):
        costs["float32"].append(cost_of(pipeline("float32", config)))
        costs["reference"].append(cost_of(loop))
        costs["bfloat16"].append(cost_of(pipeline("bfloat16", low)))
    _table(costs, len(files), "reference")
    print(
        f"pictures with an identity: {', '.join(f'{name} {n}' for name, n in made.items())} of "
        f"{len(files)}"
    )


def agreement(config: DatasetConfig, files: Sequence[Path]) -> list[float]:
    """Share of pixels with equal labels under float32 and bfloat16, for each picture."""
    pin_threads(config.threads)
    weights = Weights(config.weights)
    full, low = (
        BiSeNetParser(replace(config.parse, dtype=dtype), weights)  # type: ignore[arg-type]
        for dtype in ("float32", "bfloat16")
    )
    records = [Record(key=key_of(p.name), source=p.name, image=p.read_bytes()) for p in files]
    images = [decode_jpeg(r.image) for r in run_chain(build_stages(config)[:1], records)]
    return [float((full.parse([image])[0] == low.parse([image])[0]).mean()) for image in images]


# -------------------------------------------------------------------------------------------------


def against_img2dataset(files: Sequence[Path], folder: Path, rounds: int, count: int) -> None:
    """The resize stage and the shards' commit beside img2dataset, from one server, on one core
    each.

    What a picture costs is what `count` of them cost beyond a few: start-up and imports are no
    one's merit.
    """
    program = install(folder / "img2dataset")
    costs: dict[str, list[Cost]] = {"img2dataset": [], "ours": []}
    with serving(files[0].parent) as address:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        lists = {n: _url_list(folder, address, files, n) for n in (_FEW, count)}
        for _ in range(rounds):
            for name, work in (
                ("ours", _ours),
                ("img2dataset", lambda *given: _img2dataset(program, *given)),
            ):
                short, long = (
                    cost_of(lambda n=n, work=work: work(folder, lists[n], n)) for n in (_FEW, count)
                )  # type: ignore[misc]
                costs[name].append(Cost(long.seconds - short.seconds, long.cpu - short.cpu))
    _table(costs, count - _FEW, "img2dataset")


def install(folder: Path) -> Path:
    """img2dataset in an environment of its own, from the configured index; its program."""
    uv, python = Path(sys.executable).with_name("uv"), folder / "bin" / "python"
    if not (folder / "bin" / "img2dataset").exists():
        subprocess.run(
            [uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder], check=True
        )
        done = subprocess.run(
            [uv, "pip", "install", "--quiet", "--python", python, "img2dataset"], check=False
        )
        if done.returncode:
            raise SystemExit(
                "img2dataset can't be installed from the configured index: nothing to compare with."
            )
    listed = subprocess.run(
        [uv, "pip", "list", "--python", python, "--format", "json"], check=True, capture_output=True
    )
    versions = {row["name"]: row["version"] for row in json.loads(listed.stdout)}
    named = ("img2dataset", "opencv-python-headless", "albumentations", "webdataset")
    print(", ".join(f"{name} {versions.get(name, '?')}" for name in named), flush=True)
    return folder / "bin" / "img2dataset"


def _ours(folder: Path, urls: Path, count: int) -> None:
    given = [
        f"source.path={urls}",
        "source.kind=urls",
        "source.allow_private=true",
        f"output={folder / 'resized'}",
    ]
    given += ["shard_size=500", "executor=inline", "threads=1"]
    written = make(load(DatasetConfig, "configs/dataset/demo.yaml", given), resizing)
    assert written == count, f"{written} of {count} were written"


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
    made = sum(json.loads(path.read_text())["successes"] for path in output.glob("*_stats.json"))
    assert made == count, f"{made} of {count} were written"


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The folder over HTTP on loopback, by a process of its own; its address."""
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


# --------------------------------------------------------------------------------------------------


def _table(costs: dict[str, list[Cost]], images: int, other: str) -> None:
    """Medians of the turns; ratios over one mean faster than `other`."""
    base = [(c.seconds, c.cpu) for c in costs[other]]
    print(
        f"{images} pictures, {len(base)} turns        images/s   CPU-ms an image   images/s, "
        "ratio   CPU, ratio"
    )
    for name, turns in costs.items():
        seconds, cpu = median(c.seconds for c in turns), median(c.cpu for c in turns)
        faster = median(b[0] / c.seconds for b, c in zip(base, turns, strict=True))
        leaner = median(b[1] / c.cpu for b, c in zip(base, turns, strict=True))
        print(
            f"  {name:24} {images / seconds:14.2f} {cpu / images * 1000:17.1f} {faster:17.2f} "
            f"{leaner:12.2f}"
        )


def _cpu() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)
