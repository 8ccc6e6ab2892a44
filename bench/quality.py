"""How the figures behind the quality rules lie on your pictures, to choose limits by: `python -m
bench.quality FOLDER`.

Pictures go through resize, detect and parse. Printed are each figure's distribution, what each rule
would take with the limits given (`rules.max_yaw=45`, …, else the defaults), and the milliseconds
that each figure costs on one core.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Final

import cv2
import numpy as np
import PIL.Image
import typer

from configs.load import load
from configs.quality import RulesConfig
from configs.schema import DatasetConfig
from stages import measurements
from stages.annotations import Measures
from stages.backends.runtime import pin_threads
from stages.base import run_chain
from stages.chain import build_stages
from stages.codec import decode_jpeg, decode_labels
from stages.quality_filter import RULES, verdict
from stages.record import Face, Record, key_of

QUANTILES: Final = (0, 0.001, 0.01, 0.5, 0.99, 0.999, 1)
STAGES: Final = ("resize", "detect", "parse")


@dataclass(frozen=True, slots=True)
class Facts:
    """What the rules look at, of one picture (stages.quality_filter.Judged); the identity's norm is
    left out.
    """

    source_width: int
    source_height: int
    faces: tuple[Face, ...]
    main_face: Face
    measures: Measures
    identity_norm: float = 0.0


def main(
    folder: Annotated[Path, typer.Argument(help="searched at any depth for JPEG, PNG and WebP")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="rules.NAME=LIMIT, parse.dtype=bfloat16, …")
    ] = None,
    config: Annotated[Path, typer.Option(help="of the data set")] = Path(
        "configs/dataset/demo.yaml"
    ),
    limit: Annotated[int, typer.Option(help="pictures, evenly over the folder; 0: all")] = 0,
) -> None:
    pin_threads(1)
    cv2.setNumThreads(1)
    given = settings or []
    rules = load(
        RulesConfig, None, [s.removeprefix("rules.") for s in given if s.startswith("rules.")]
    )
    dataset = load(DatasetConfig, config, [s for s in given if not s.startswith("rules.")])
    files = sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in dataset.source.extensions and p.is_file()
    )
    files = files[:: max(1, len(files) // limit)][:limit] if limit else files
    spent: dict[str, list[float]] = {}
    facts = list(measured(files, dataset, spent))
    if not facts:
        raise typer.BadParameter(f"no face was measured in the {len(files)} pictures of {folder}")
    print(f"{len(facts)} of {len(files)} pictures measured\n")
    print("\n".join(distribution(facts)), "\n")
    print("\n".join(judged(facts, rules)), "\n")
    print(
        "milliseconds, median: "
        + " · ".join(f"{n} {median(s) * 1e3:.2f}" for n, s in spent.items())
    )


def measured(
    files: Sequence[Path], config: DatasetConfig, spent: dict[str, list[float]]
) -> Iterator[Facts]:
    """The facts of every picture in which a face was parsed; the seconds of each figure go to
    `spent`.
    """
    chain = [stage for stage in build_stages(config) if stage.name in STAGES]
    for stage in chain:
        stage.setup()
    for path in files:
        data = path.read_bytes()
        record = run_chain(chain, [Record(key=key_of(path.name), source=path.name, image=data)])[0]
        if record.ok:
            image, labels, face = (
                decode_jpeg(record.image),
                decode_labels(record.parsing),
                record.main_face,
            )
            time_each(image, labels, face, spent)
            width, height = PIL.Image.open(io.BytesIO(data)).size
            yield Facts(
                width, height, record.faces, face, measurements.measure(image, labels, face)
            )


def time_each(image: Any, labels: Any, face: Face, spent: dict[str, list[float]]) -> None:
    grey = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)
    rotation = measurements.rotation_of(face)
    calls: dict[str, Callable[[], object]] = {
        "all": lambda: measurements.measure(image, labels, face),
        "sharpness": lambda: measurements.sharpness_of(grey, face),
        "brightness, clipped": lambda: measurements.exposure_of(grey, labels, face),
        "yaw, pitch, roll": lambda: measurements.rotation_of(face),
        "occlusion": lambda: measurements.occlusion_of(labels, face, rotation),
        "hash": lambda: measurements.hash_of(grey),
    }
    for name, call in calls.items():
        began = time.perf_counter()
        call()
        spent.setdefault(name, []).append(time.perf_counter() - began)


def distribution(facts: Sequence[Facts]) -> Iterator[str]:
    """A line for each rule's figure: its quantiles."""
    yield f"{'figure':24}" + "".join(f"{f'{q:.1%}':>9}" for q in QUANTILES)
    for what, figure in {rule.what: rule.figure for rule in RULES}.items():
        values = [value for fact in facts if (value := figure(fact)) is not None]
        if values:
            yield f"{what:24}" + "".join(
                f"{value:9.3f}" for value in np.quantile(values, QUANTILES)
            )


def judged(facts: Sequence[Facts], rules: RulesConfig) -> Iterator[str]:
    """A line for each rule: how many break it, whichever others they break; and one for all of
    them.
    """
    for rule in RULES:
        limit = getattr(rules, rule.setting)
        broken = sum(bool(rule.broken(fact, rules)) for fact in facts)
        yield f"{rule.setting + '=' + format(limit, 'g'):24}{broken:9}  {rule.reason}"
    lost = sum(verdict(fact, rules) is not None for fact in facts)
    yield f"{'any rule':24}{lost:9}  {lost / len(facts):.2%}"


if __name__ == "__main__":
    typer.run(main)
