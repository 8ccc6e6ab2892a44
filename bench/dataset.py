"""Speed of the data set pipeline against its own models, side by side in one run: `make bench`.

    bare     the four models called in a plain loop on pictures already decoded and resized: the limit
    inline   the whole pipeline in one process: decoding, resizing, encoding, shards
    ray      the same on a local Ray cluster, from the first shard committed to the last (start-up left out)

Bare and inline take turns, and Ray runs between two halves of those turns, so that a machine whose
speed drifts does it to all three. Ratios are what to quote. `--against` runs another comparison in
place of these (bench/against.py):

    reference     a loop that works as the reference's data scripts do, with the same weights and threads
    img2dataset   download, resize and shard alone, beside our resize stage and commit
"""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import time
from collections.abc import Sequence
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


class Contender(StrEnum):
    reference = "reference"
    img2dataset = "img2dataset"


class Bare:
    """The models of a chain, called singly on what they take: nothing is decoded, encoded or
    written.
    """

    def __init__(self, config: DatasetConfig, files: Sequence[Path]) -> None:
        self._chain = {stage.name: stage for stage in build_stages(config)}
        for stage in self._chain.values():
            stage.setup()
        self._config = config
        records = [Record(key=key_of(p.name), source=p.name, image=p.read_bytes()) for p in files]
        made = run_chain(list(self._chain.values()), records)
        self._inputs = [(r, decode_jpeg(r.image), r.main_face) for r in made if r.ok]

    def seconds(self, start: int, end: int) -> dict[str, float]:
        """Seconds spent in each model over inputs[start:end]."""
        backends = {
            name: stage.backend for name, stage in self._chain.items() if hasattr(stage, "backend")
        }
        spent = dict.fromkeys(backends, 0.0)
        for record, image, face in self._inputs[start:end]:
            # so that captions find them decoded
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
                began = time.perf_counter()
                call()
                spent[name] += time.perf_counter() - began
        return spent

    def __len__(self) -> int:
        return len(self._inputs)


def run_pipeline(config: DatasetConfig) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of the whole run, and its manifests."""
    shutil.rmtree(config.output, ignore_errors=True)
    began = time.perf_counter()
    done = list(execute(plan_job(config), lambda count: None))
    return time.perf_counter() - began, done


def main(
    count: Annotated[
        int, typer.Option(min=40, help="Portraits; at least 200 for figures to quote.")
    ] = 208,
    rounds: Annotated[
        int, typer.Option(min=1, help="Times bare and inline take turns, before and after Ray.")
    ] = 2,
    folder: Annotated[Path, typer.Option(help="Where pictures and outputs go.")] = Path(
        "runs/bench"
    ),
    against: Annotated[Contender | None, typer.Option(help="Compare with this instead.")] = None,
    urls: Annotated[int, typer.Option(min=200, help="Downloads, against img2dataset.")] = 1000,
) -> None:
    """Print images/s of the bare models, of the inline executor and of Ray, and their ratios."""
    photos = folder / f"photos-{count}"  # no more of them than are counted
    files = list(write_portraits(photos, count, 0))
    threads = cores()
    given = [f"source.path={photos}", "shard_size=16"]
    base = load(DatasetConfig, "configs/dataset/demo.yaml", given)
    inline = replace(base, executor="inline", threads=threads, output=str(folder / "inline"))
    if against is Contender.reference:
        against_reference(inline, files, folder, rounds)
        return
    if against is Contender.img2dataset:
        against_img2dataset(files, folder, rounds, urls)
        return
    pin_threads(threads)
    bare = Bare(inline, files)
    bare_rates, inline_rates, spent = [], [], dict[str, float]()
    stage_seconds: dict[str, float] = {}

    def turn() -> None:
        seconds = bare.seconds(0, len(bare))
        bare_rates.append(len(bare) / sum(seconds.values()))
        for name, value in seconds.items():
            spent[name] = spent.get(name, 0.0) + value
        _, done = run_pipeline(inline)
        inline_rates.append(throughput(done))
        for manifest in done:
            for name, value in manifest.run.stage_seconds.items():
                stage_seconds[name] = stage_seconds.get(name, 0.0) + value

    for _ in range(rounds):
        turn()
    ray_seconds, ray_done = run_pipeline(replace(base, executor="ray", output=str(folder / "ray")))
    for _ in range(rounds):
        turn()
    report(count, threads, bare_rates, inline_rates, throughput(ray_done), ray_seconds)
    turns = len(bare_rates)
    print("where the time goes, ms per image (bare model / stage in the inline pipeline):")
    for name, value in stage_seconds.items():
        model = spent.get(name)
        shown = f"{model / turns / len(bare) * 1000:7.1f}" if model is not None else "      -"
        print(f"  {name:8} {shown} / {value / turns / count * 1000:7.1f}")


def report(
    count: int, cores: int, bare: list[float], inline: list[float], ray: float, ray_seconds: float
) -> None:
    """The three rates with their spread, the two ratios, and one line of JSON."""
    b, i = statistics.median(bare), statistics.median(inline)
    print(f"{count} portraits, {cores} cores, {_cpu()}, Python {platform.python_version()}")
    print(
        f"bare    {b:6.2f} images/s (min {min(bare):.2f}, max {max(bare):.2f}, {len(bare)} turns)"
    )
    print(
        f"inline  {i:6.2f} images/s (min {min(inline):.2f}, max {max(inline):.2f})   inline/bare "
        f"{i / b:.3f}"
    )
    print(
        f"ray     {ray:6.2f} images/s in steady state; {ray_seconds:.1f} s in all   ray/bare    "
        f"{ray / b:.3f}"
    )
    print(
        json.dumps(
            {"bare": round(b, 3), "inline_ratio": round(i / b, 3), "ray_ratio": round(ray / b, 3)}
        )
    )


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if "model name" in line
        ]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    typer.run(main)
