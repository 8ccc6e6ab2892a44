"""How long portraits take, in the reference's order of work and in ours, and how much memory.

    python -m bench.inference                                   # on a CPU: 4 steps, 512 × 512
    python -m bench.inference --device cuda                     # on a GPU: 50 steps, 512 × 768
    python -m bench.inference --model sdxl --dtype bfloat16

Stable Diffusion at full size with random weights and an adapter of random weights, which are made
once under `--base` (SD1.5 4 GB, SDXL 9 GB); the face models and the portrait are the demo's.
Nothing is downloaded: if they aren't in the cache, or with `--no-photo`, a synthetic label map and
embedding take the photograph's place, and the output says so.

In each turn a process of each order (`bench.portraits`) runs alone, one order after the other; the
first of them changes from turn to turn. It measures:

- cold: loading the adapter and the image encoder, and the first image from the photograph;
- warm: further images of the same person, each with a new prompt, and the time until the UNet's
  first step. Ours keeps the person; the reference's order reads the photograph each time;
- per image in batches of four prompts; the reference's order makes one at a time, as when warm;
- the peak of the process's memory, with and without mapped files, and of the GPU's.

A third process, *saved*, is ours with the identity from a file, without an image encoder. Printed
are medians as a table, then everything as a line of JSON. Both orders should make the same images:
the difference of their first ones is printed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import torch
import typer
from PIL import Image, ImageOps

from bench.bases import make_adapter, make_base
from bench.memory import own_peak, peak
from bench.portraits import SECTIONS, Clock, Images, Order, Ours, ReferenceOrder, Setup
from bench.synthetic_person import synthetic_person
from configs.schema import DatasetConfig
from pipelines.demo.synthesize import write_portraits
from stages.backends.weights import Weights
from stages.record import Record

_BATCH: Final = 4
_PROMPTS: Final = ("reading", "on a horse", "in the rain", "at sea", "in a red coat", "cooking")
_MODE: Final = "legacy"  # that of the published weights
_NETWORK_FILES: Final = ("mapping_bin", "mapping_xml", "synthesis_bin", "synthesis_xml")
_ORDERS: Final = ("reference", "ours", "saved")
Values = dict[str, float]  # seconds, or MB


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One process. identity: the person's file, which `ours` writes and `saved` reads. images:
    warm ones to measure. batches: of four prompts. threads: of torch; 0 for its default.
    """

    order: str
    setup: Setup
    identity: Path
    steps: int
    images: int
    batches: int
    threads: int


def main(
    model: Annotated[str, typer.Option(help="sd15, sdxl or tiny.")] = "sd15",
    device: Annotated[str, typer.Option(help="cpu or cuda; empty: cuda if there is one.")] = "",
    dtype: Annotated[str, typer.Option(help="Empty: float16 on a GPU, float32 on a CPU.")] = "",
    steps: Annotated[int, typer.Option(min=0, help="0: 50 on a GPU, 4 on a CPU.")] = 0,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT; empty: see above.")] = "",
    turns: Annotated[int, typer.Option(min=1, help="Processes of each order.")] = 3,
    images: Annotated[int, typer.Option(min=1, help="Warm images in each process.")] = 2,
    batches: Annotated[int, typer.Option(min=0, help="Batches in each process.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="0: torch's default.")] = 0,
    base: Annotated[
        Path | None, typer.Option(help="Folder of the random weights; made once.")
    ] = None,
    photo: Annotated[Path | None, typer.Option(help="A photograph of a face.")] = None,
    no_photo: Annotated[bool, typer.Option(help="Leave the face models out.")] = False,
) -> None:
    """Measure both orders of work and print a table and a line of JSON."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # of the processes, before they import it
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device != "cpu"
    dtype = dtype or ("float16" if on_gpu else "float32")
    steps = steps or (50 if on_gpu else 4)
    width, height = (int(side) for side in (size or _size(model, on_gpu)).split("x"))
    folder = base or Path("runs/bench-inference", model)
    _alone(_prepare, folder, model, device)
    person, person_text = _person(folder, photo, no_photo)
    setup = Setup(
        model=model,
        folder=folder,
        photo=person,
        size=(width, height),
        device=device,
        dtype=getattr(torch, dtype),
    )
    print(
        f"{model}, {width} × {height}, {steps} steps, {device_name(device)}, {dtype}; "
        f"{person_text}; medians of {turns} turns",
        flush=True,
    )
    results: dict[str, list[dict[str, Any]]] = {order: [] for order in _ORDERS}
    with tempfile.TemporaryDirectory(prefix="inference-") as scratch:
        for turn in range(turns):
            for order in _in_turn(turn):
                task = Task(
                    order=order,
                    setup=setup,
                    identity=Path(scratch, "identity.safetensors"),
                    steps=steps,
                    images=images,
                    batches=batches,
                    threads=threads,
                )
                results[order].append(_alone(measure, task))
                print(f"turn {turn + 1}: {order} done", file=sys.stderr, flush=True)
    difference = _difference(results)
    summary = {order: summarised(runs) for order, runs in results.items()}
    for line in table(summary):
        print(line)
    print(f"largest difference of the first images, of 1: {difference:.2g}")
    about = {"model": model, "device": device_name(device), "dtype": dtype, "steps": steps}
    about |= {"size": [width, height], "turns": turns, "photograph": person_text}
    print(json.dumps({**about, "difference": difference, "orders": summary}))


def _size(model: str, on_gpu: bool) -> str:
    if model == "tiny":
        return "64x64"
    if model == "sdxl":
        return "864x1152" if on_gpu else "512x512"
    return "512x768" if on_gpu else "512x512"


def device_name(device: str) -> str:
    if device == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name()


def _in_turn(turn: int) -> tuple[str, ...]:
    """Returns the orders as they run in a turn: `saved` needs the file that `ours` writes."""
    first, second, saved = _ORDERS
    return (first, second, saved) if turn % 2 == 0 else (second, saved, first)


def _alone(function: Any, *arguments: Any) -> Any:
    """Calls a function in a new process, which has loaded nothing and whose peak is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _prepare(folder: Path, model: str, device: str) -> None:
    """Makes what isn't there, and reads it all, so that no order pays for a cold disk."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").is_dir():
        make_base(folder / "base", model, device)
    if not (folder / "adapter" / "adapter.json").is_file():
        make_adapter(folder / "adapter", model, _MODE, DatasetConfig().embed.weights, device)
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def _person(folder: Path, photo: Path | None, no_photo: bool) -> tuple[Path | Record, str]:
    """Returns the photograph, or the record that takes its place, and how to call it."""
    config, weights = DatasetConfig(), Weights()
    faces = (config.detect.weights, config.parse.weights, config.embed.weights)
    networks = [f"stylegan_{part}" for part in _NETWORK_FILES]
    if no_photo:
        return synthetic_person(), "no photograph, but a synthetic label map and embedding"
    if not _there(weights, faces, "onnxruntime"):
        return synthetic_person(), "synthetic label map and embedding, as the face models lack"
    if photo is not None:
        return photo, f"photograph {photo.name}"
    portrait = folder / "photograph.png"
    if not portrait.exists() and not _there(weights, networks, "openvino"):
        return synthetic_person(), "synthetic label map and embedding, as there is no --photo"
    if not portrait.exists():
        _alone(_write_portrait, portrait)
    return portrait, "a synthetic photograph"


def _there(weights: Weights, names: Sequence[str], package: str) -> bool:
    """Whether files are in the cache of weights, and a package is installed."""
    return all(map(weights.has, names)) and importlib.util.find_spec(package) is not None


def _write_portrait(target: Path) -> None:
    """Writes a synthetic portrait with a wide border: legacy mode finds no face that fills the
    photograph.
    """
    [path] = write_portraits(target.parent, count=1, seed=7)
    with Image.open(path) as image:
        framed = ImageOps.expand(image, image.width // 2, "grey").resize(image.size)
    framed.save(target)


def measure(task: Task) -> dict[str, Any]:
    """Runs an order of work; see the module."""
    _quieten()
    if task.threads:
        torch.set_num_threads(task.threads)
    setup = task.setup
    clock = Clock(setup.device)
    order: Order
    if task.order == "reference":
        order = ReferenceOrder(setup, clock)
    else:
        order = Ours(setup, clock, task.identity if task.order == "saved" else None)
    with own_peak() as own:
        first, result = _one_by_one(task, order, clock)
    result["peaks"] = {"MB": peak(), "MB without mapped files": own[0]}
    if setup.device == "cuda":
        result["peaks"]["GPU MB"] = torch.cuda.max_memory_allocated() / 2**20
    result["batch"] = _batches(task, order, clock)
    if task.order == "reference":  # it makes them one by one, as the warm images
        result["batch"] = [row["total"] for row in result["warm"]]
    if isinstance(order, Ours) and order.person is not None and task.order == "ours":
        order.person.save(task.identity)
    return result | {"image": first[0]}


def _one_by_one(task: Task, order: Order, clock: Clock) -> tuple[Images, dict[str, Any]]:
    """Loads everything and makes the first image, which is returned, and the warm ones."""
    clock.start()
    order.load_base()
    result: dict[str, Any] = {"base": clock.elapsed}
    clock.start()
    with clock.section("adapter"):
        order.load_adapter()
    order.read_person()
    first = order.images([_prompt(0)], [0], task.steps)
    result["cold"] = _times(clock, "adapter", *SECTIONS)
    result["warm"] = []
    for number in range(1, task.images + 1):
        clock.start()
        order.images([_prompt(number)], [number], task.steps)
        result["warm"].append(_times(clock, *SECTIONS))
    return first, result


def _batches(task: Task, order: Order, clock: Clock) -> list[float]:
    """Returns the seconds for an image of each batch."""
    if task.order != "ours" or not task.batches:
        return []
    if task.setup.device != "cpu":
        order.images([_prompt(0)] * _BATCH, range(_BATCH), 1)  # a GPU chooses kernels by shape
    seconds = []
    for number in range(task.batches):
        prompts = [f"{_prompt(index)}, {number}" for index in range(_BATCH)]
        clock.start()
        order.images(prompts, range(_BATCH), task.steps)
        seconds.append(clock.elapsed / _BATCH)
    return seconds


def _quieten() -> None:
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _prompt(number: int) -> str:
    return f"a photo of a person {_PROMPTS[number % len(_PROMPTS)]}, {number}"


def _times(clock: Clock, *sections: str) -> Values:
    total = clock.elapsed
    seconds = {name: clock.seconds.get(name, 0.0) for name in sections}
    other = total - sum(seconds.values())
    return {"first step": clock.first_step, **seconds, "other": other, "total": total}


def _difference(results: Mapping[str, Sequence[dict[str, Any]]]) -> float:
    """Takes the images out of the results, and returns how far the first two orders' differ."""
    images = {order: [run.pop("image") for run in runs] for order, runs in results.items()}
    return float(np.abs(images["reference"][0] - images["ours"][0]).max())


def summarised(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the medians of an order's processes."""

    def medians(rows: Sequence[Values]) -> Values:
        return {name: round(statistics.median(row[name] for row in rows), 4) for name in rows[0]}

    batch = [seconds for run in runs for seconds in run["batch"]]
    return {
        "base": round(statistics.median(run["base"] for run in runs), 4),
        "cold": medians([run["cold"] for run in runs]),
        "warm": medians([row for run in runs for row in run["warm"]]),
        "batch": round(statistics.median(batch), 4) if batch else None,
        "peaks": medians([run["peaks"] for run in runs]),
    }


def table(summary: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yields the lines of a table in Markdown: what, each order, and the ratio of the first two."""
    yield "| seconds | reference's order | ours | ratio | ours, saved identity |"
    yield "| --- | --- | --- | --- | --- |"

    def row(name: str, values: Sequence[float | None]) -> str:
        reference, ours, saved = (_number(value) for value in values)
        ratio = f"{values[0] / values[1]:.2f}" if values[0] and values[1] else "–"
        return f"| {name} | {reference} | {ours} | {ratio} | {saved} |"

    orders = [summary[order] for order in _ORDERS]
    yield row("base model", [order["base"] for order in orders])
    for part, label in (("cold", "cold, first image"), ("warm", "warm")):
        names = {"first step": "until the UNet's first step", "total": "end to end"}
        for name in orders[0][part]:
            shown = names.get(name, name)
            yield row(f"{label}: {shown}", [order[part][name] for order in orders])
    yield row(f"per image, batches of {_BATCH}", [order["batch"] for order in orders])
    for name in orders[0]["peaks"]:
        yield row(f"peak, {name}", [order["peaks"][name] for order in orders])


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    typer.run(main)
