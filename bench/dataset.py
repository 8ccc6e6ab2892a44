"""Speed of the data set pipeline compared with its bare models: `make bench`.

    bare     the four models, called in a loop on decoded and resized images: the upper limit
    inline   the whole pipeline in one process: decoding, resizing, encoding, shards
    ray      the pipeline on a local Ray cluster, from the first committed shard to the last,
             without start-up

Bare and inline take turns, and Ray runs after half of them, so that a drift of the machine's speed
affects all three. Quote the ratios. `--against` runs another comparison (bench/against.py):

    reference     a loop like the reference's data scripts, with the same weights and threads
    img2dataset   download, resize and sharding, compared with the resize stage and commit
"""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.against import against_img2dataset, against_reference, cores
from configs.load import load
from configs.schema import DatasetConfig
from pipelines.demo.synthesize import write_portraits
from pipelines.run import execute, plan_job, throughput
from stages.backends.runtime import pin_threads
from stages.base import run_chain
from stages.chain import build_stages
from stages.codec import decode_jpeg, decode_labels
from stages.detect import find_faces
from stages.record import Record, key_of
from stages.storage.manifest import Manifest


class Contender(StrEnum):
    reference = "reference"
    img2dataset = "img2dataset"


class Bare:
    """Times the models of a chain on decoded images. Nothing is decoded, encoded or written."""

    def __init__(self, config: DatasetConfig, files: Sequence[Path]) -> None:
        self._chain = {stage.name: stage for stage in build_stages(config)}
        for stage in self._chain.values():
            stage.setup()
        self._config = config
        records = [Record(key=key_of(p.name), source=p.name, image=p.read_bytes()) for p in files]
        processed = run_chain(list(self._chain.values()), records)
        self._inputs = [(r, decode_jpeg(r.image), r.main_face) for r in processed if r.ok]

    def seconds(self) -> dict[str, float]:
        """Runs each model on all inputs, and returns the seconds spent in each."""
        backends = {
            name: stage.backend for name, stage in self._chain.items() if hasattr(stage, "backend")
        }
        spent = dict.fromkeys(backends, 0.0)
        for record, image, face in self._inputs:
            # Fill the cache of decoded images, from which the caption backend reads.
            decode_jpeg(record.image), decode_labels(record.parsing)
            calls: dict[str, Any] = {
                "detect": lambda image=image: find_faces(
                    backends["detect"], image, self._config.detect
                ),
                "parse": lambda image=image: backends["parse"].parse([image]),
                "embed": lambda image=image, face=face: backends["embed"].embed([image], [face]),
                "caption": lambda record=record: backends["caption"].caption([record]),
            }
            for name, call in calls.items():
                started = time.perf_counter()
                call()
                spent[name] += time.perf_counter() - started
        return spent

    def __len__(self) -> int:
        return len(self._inputs)


def run_pipeline(config: DatasetConfig) -> tuple[float, list[Manifest]]:
    """Makes a data set; returns the seconds of the run and the shards' manifests."""
    shutil.rmtree(config.output, ignore_errors=True)
    started = time.perf_counter()
    manifests = list(execute(plan_job(config), lambda count: None))
    return time.perf_counter() - started, manifests


def main(
    count: Annotated[
        int, typer.Option(min=40, help="Portraits; use at least 200 for numbers to quote.")
    ] = 208,
    rounds: Annotated[
        int, typer.Option(min=1, help="Turns of bare and inline, both before and after Ray.")
    ] = 2,
    folder: Annotated[Path, typer.Option(help="Folder for images and outputs.")] = Path(
        "runs/bench"
    ),
    against: Annotated[
        Contender | None, typer.Option(help="Run this comparison in place of the default one.")
    ] = None,
    urls: Annotated[
        int, typer.Option(min=200, help="Downloads in the comparison with img2dataset.")
    ] = 1000,
) -> None:
    """Print images/s of the bare models, of the inline executor and of Ray, and their ratios."""
    photos = folder / f"photos-{count}"  # its own folder, since all files in it are used
    files = list(write_portraits(photos, count, 0))
    threads = cores()
    overrides = [f"source.path={photos}", "shard_size=16"]
    base = load(DatasetConfig, "configs/dataset/demo.yaml", overrides)
    inline = replace(base, executor="inline", threads=threads, output=str(folder / "inline"))
    if against is Contender.reference:
        against_reference(inline, files, folder, rounds)
        return
    if against is Contender.img2dataset:
        against_img2dataset(files, folder, rounds, urls)
        return
    pin_threads(threads)
    bare = Bare(inline, files)
    bare_rates, inline_rates = [], []
    model_seconds: dict[str, float] = {}
    stage_seconds: dict[str, float] = {}

    def turn() -> None:
        seconds = bare.seconds()
        bare_rates.append(len(bare) / sum(seconds.values()))
        add_seconds(model_seconds, seconds)
        _, manifests = run_pipeline(inline)
        inline_rates.append(throughput(manifests))
        for manifest in manifests:
            add_seconds(stage_seconds, manifest.run.stage_seconds)

    for _ in range(rounds):
        turn()
    ray_seconds, ray_manifests = run_pipeline(
        replace(base, executor="ray", output=str(folder / "ray"))
    )
    for _ in range(rounds):
        turn()
    report(count, threads, bare_rates, inline_rates, throughput(ray_manifests), ray_seconds)
    turns = len(bare_rates)
    print("milliseconds an image, bare model / stage of the inline pipeline:")
    for name, seconds in stage_seconds.items():
        model = "      -"
        if name in model_seconds:
            model = f"{model_seconds[name] / turns / len(bare) * 1000:7.1f}"
        print(f"  {name:8} {model} / {seconds / turns / count * 1000:7.1f}")


def add_seconds(totals: dict[str, float], seconds: Mapping[str, float]) -> None:
    """Adds `seconds` to `totals`, by name."""
    for name, value in seconds.items():
        totals[name] = totals.get(name, 0.0) + value


def report(
    count: int, cores: int, bare: list[float], inline: list[float], ray: float, ray_seconds: float
) -> None:
    """Prints the three rates with their spread, the two ratios, and a line of JSON."""
    bare_rate, inline_rate = statistics.median(bare), statistics.median(inline)
    inline_ratio, ray_ratio = inline_rate / bare_rate, ray / bare_rate
    print(f"{count} portraits, {cores} cores, {_cpu()}, Python {platform.python_version()}")
    print(
        f"bare    {bare_rate:6.2f} images/s (min {min(bare):.2f}, max {max(bare):.2f}, "
        f"{len(bare)} turns)"
    )
    print(
        f"inline  {inline_rate:6.2f} images/s (min {min(inline):.2f}, max {max(inline):.2f})   "
        f"inline/bare {inline_ratio:.3f}"
    )
    print(
        f"ray     {ray:6.2f} images/s in steady state; {ray_seconds:.1f} s in all   "
        f"ray/bare    {ray_ratio:.3f}"
    )
    ratios = {"inline_ratio": round(inline_ratio, 3), "ray_ratio": round(ray_ratio, 3)}
    print(json.dumps({"bare": round(bare_rate, 3), **ratios}))


def _cpu() -> str:
    """Returns the name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    typer.run(main)
