"""Distributions of the quality metrics on your images: `python -m bench.quality FOLDER`.

They help to choose the limits of the quality rules. The images go through resize, detect and parse.
The output is the distribution of each metric, the number of images that each rule would drop with
the limits on the command line (`rules.max_yaw=45`, …) or the defaults, and the milliseconds that
each metric takes on one core.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Final

import cv2
import numpy as np
import typer

from configs.load import load
from configs.quality import RulesConfig
from configs.schema import DatasetConfig
from stages import measurements
from stages.backends.runtime import pin_threads
from stages.base import run_chain
from stages.chain import build_stages
from stages.codec import decode_jpeg, decode_labels
from stages.quality_filter import RULES, broken_rule
from stages.record import Face, Record, key_of

QUANTILES: Final = (0, 0.001, 0.01, 0.5, 0.99, 0.999, 1)
STAGES: Final = ("resize", "detect", "parse")


def main(
    folder: Annotated[
        Path, typer.Argument(help="Searched at any depth for JPEG, PNG and WebP files.")
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(help="rules.NAME=LIMIT, parse.dtype=bfloat16, …")
    ] = None,
    config: Annotated[Path, typer.Option(help="Preset of the data set.")] = Path(
        "configs/dataset/demo.yaml"
    ),
    limit: Annotated[int, typer.Option(help="Images to use, spread over the folder; 0: all.")] = 0,
) -> None:
    """Print the distributions of the quality metrics, and what the rules would drop."""
    pin_threads(1)
    cv2.setNumThreads(1)
    overrides = settings or []
    limits = [s.removeprefix("rules.") for s in overrides if s.startswith("rules.")]
    rules = load(RulesConfig, None, limits)
    dataset = load(DatasetConfig, config, [s for s in overrides if not s.startswith("rules.")])
    files = sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in dataset.source.extensions and p.is_file()
    )
    files = files[:: max(1, len(files) // limit)][:limit] if limit else files
    seconds: dict[str, list[float]] = {}
    records = list(measure(files, dataset, seconds))
    if not records:
        raise typer.BadParameter(
            f"no face was measured in the {len(files)} images of {folder}; name a folder of "
            "photographs of people"
        )
    print(f"{len(records)} of {len(files)} images measured\n")
    print("\n".join(distributions(records)), "\n")
    print("\n".join(dropped_by_rule(records, rules)), "\n")
    print(
        "milliseconds, median: "
        + " · ".join(f"{name} {median(times) * 1e3:.2f}" for name, times in seconds.items())
    )


def measure(
    files: Sequence[Path], config: DatasetConfig, seconds: dict[str, list[float]]
) -> Iterator[Record]:
    """Yields the record, with its measures, of every image in which a face was parsed.

    The time of each metric is appended to `seconds`.
    """
    chain = [stage for stage in build_stages(config) if stage.name in STAGES]
    for stage in chain:
        stage.setup()
    for path in files:
        data = path.read_bytes()
        record = run_chain(chain, [Record(key=key_of(path.name), source=path.name, image=data)])[0]
        if record.ok:
            image, labels = decode_jpeg(record.image), decode_labels(record.parsing)
            face = record.main_face
            time_metrics(image, labels, face, seconds)
            yield record.annotated(measurements.measure(image, labels, face))


def time_metrics(image: Any, labels: Any, face: Face, seconds: dict[str, list[float]]) -> None:
    """Measures each metric of an image once and appends its time to `seconds`."""
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
        started = time.perf_counter()
        call()
        seconds.setdefault(name, []).append(time.perf_counter() - started)


def distributions(records: Sequence[Record]) -> Iterator[str]:
    """Yields a line for each metric of a rule, with its quantiles."""
    yield f"{'metric':24}" + "".join(f"{f'{q:.1%}':>9}" for q in QUANTILES)
    for label, value_of in {rule.label: rule.value for rule in RULES}.items():
        values = [value for record in records if (value := value_of(record)) is not None]
        if values:
            yield f"{label:24}" + "".join(
                f"{value:9.3f}" for value in np.quantile(values, QUANTILES)
            )


def dropped_by_rule(records: Sequence[Record], rules: RulesConfig) -> Iterator[str]:
    """Yields a line for each rule with the number of images that break it, and one for any rule."""
    for rule in RULES:
        limit = getattr(rules, rule.setting)
        broken = sum(bool(rule.detail(record, rules)) for record in records)
        yield f"{rule.setting + '=' + format(limit, 'g'):24}{broken:9}  {rule.reason}"
    dropped = sum(broken_rule(record, rules) is not None for record in records)
    yield f"{'any rule':24}{dropped:9}  {dropped / len(records):.2%}"


if __name__ == "__main__":
    typer.run(main)
