"""OUT/report/index.html: how a run went. One file, which needs no network.

It is made of the run's own files, so `python -m train.cli report OUT` can write it at any time.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from configs.errors import ConfigError
from configs.load import to_yaml
from train.curves import STYLE, curves
from train.facts import NONFINITE, SKIPPED
from train.flops import peak_flops
from train.history import HISTORY, SHEETS, TIMES, VALIDATIONS, read_lines
from train.segments import Segment, read_segments
from train.spikes import SPIKES
from train.step import LOSSES
from train.step_clock import PARTS

REPORT: Final = "report/index.html"
_SHEETS_SHOWN: Final = 12
_SHEET_WIDTH: Final = 720  # pixels
_MOST_LINES: Final = 4000  # of the losses in memory
_ROWS: Final = 20  # of a table of samples

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem;
  color: #222; background: #fff }
h2 { margin-top: 2.5rem } table { border-collapse: collapse } img { max-width: 100% }
td, th { padding: 0.1rem 1rem 0.1rem 0; text-align: left; vertical-align: top;
  font-variant-numeric: tabular-nums }
pre { background: #f6f6f6; padding: 0.7rem; overflow: auto } .none { color: #777 }
"""


def write_report(output: Path) -> Path:
    """Writes the report of a run in a local folder, and returns its path.

    Raises ConfigError if there is no run.
    """
    segments, times = read_segments(output), [*read_lines(output / TIMES)]
    lines = _thinned(output / HISTORY)
    if not lines:
        raise ConfigError(f"{output}: the run has recorded no step yet.")
    title = f"Training {output.resolve().name}"
    body = "".join(
        (
            f"<h1>{escape(title)}</h1>",
            _summary(segments, lines, times),
            "<h2>Losses</h2>",
            _losses(lines),
            _validation(output),
            "<h2>Speed</h2>",
            _speed(segments[-1], times),
            _bad_samples(output),
            "<h2>Settings</h2>",
            f"<pre>{escape(to_yaml(segments[-1].config()))}</pre>",
        )
    )
    html = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}{STYLE}</style>{body}</html>\n"
    )
    path = output / REPORT
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(html, encoding="utf-8")
    partial.replace(path)
    return path


def _thinned(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of the losses, or of a long run, means of equally many: the last step, and
    of each number the mean of those that are finite.
    """
    count = _count_lines(path)
    size = -(-count // _MOST_LINES) or 1
    lines, source = list[dict[str, Any]](), read_lines(path)
    while part := [*islice(source, size)]:
        values = {
            name: [x for each in part if (x := each.get(name)) is not None]
            for name in part[-1]
            if name != "step"
        }
        means = {name: sum(xs) / len(xs) if xs else None for name, xs in values.items()}
        lines.append({"step": part[-1]["step"], **means})
    return lines


def _count_lines(path: Path) -> int:
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _summary(
    segments: Sequence[Segment], lines: Sequence[Mapping[str, Any]], times: Sequence[Any]
) -> str:
    now = segments[-1]
    config, step = now.config(), lines[-1]["step"]
    seconds = sum(line["seconds"] * line["steps"] for line in times)
    rows = {
        "steps": f"{step:,} of {config.max_train_steps:,}, of {now.batch}",
        "time in steps": f"{seconds / 3600:.2f} hours" if times else "not recorded",
        "device": f"{now.device}, torch {now.torch}",
        "model": f"{config.model.spec}, {config.model.mode}, base {config.model.base or 'default'}",
        "trained": ", ".join(config.trained_parts),
        "started from": config.adapter or "initial weights",
        "data": "; ".join(
            f"{source.path} ({digest[:12]})"
            for source, digest in zip(config.data, now.data, strict=False)
        ),
        "features read": ", ".join(now.features) or "none",
        "starts": f"{len(segments)}, at steps {', '.join(f'{each.step:,}' for each in segments)}",
    }
    return _table([], [*rows.items()])


def _losses(lines: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name in lines[-1] if name != "step"]
    rates = [name for name in names if name not in LOSSES]
    plots = [(name, [name]) for name in LOSSES] + [("learning rate", rates)]
    return "".join(
        curves(title, {name: [(line["step"], line.get(name)) for line in lines] for name in shown})
        for title, shown in plots
    )


def _validation(output: Path) -> str:
    lines = [*read_lines(output / VALIDATIONS)]
    if not lines:
        return "<h2>Validation</h2><p class='none'>None: set validation_steps.</p>"
    series = {
        name: [(line["step"], line[key]) for line in lines]
        for name, key in (("right person", "right"), ("another person", "swapped"))
    }
    paths = (output / SHEETS / f"{line['step']:06d}.jpg" for line in lines)
    sheets = [path for path in paths if path.is_file()]
    chosen = np.unique(np.linspace(0, len(sheets) - 1, _SHEETS_SHOWN).round().astype(int))
    pictures = "".join(
        f"<figure><img src='{_embedded(sheets[index])}' alt=''>"
        f"<figcaption>step {int(sheets[index].stem):,}</figcaption></figure>"
        for index in (chosen if sheets else ())
    )
    prompts = "a photograph, then a portrait for each prompt of validation.prompts"
    return (
        "<h2>Validation</h2><p>People whom it isn't trained on.</p>"
        f"{curves('noise loss at fixed timesteps', series)}<p>In each row: {prompts}.</p>{pictures}"
    )


def _embedded(path: Path) -> str:
    with Image.open(path) as image:
        image.thumbnail((_SHEET_WIDTH, 100 * _SHEET_WIDTH))
        with io.BytesIO() as out:
            image.save(out, format="jpeg", quality=85)
            data = out.getvalue()
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def _speed(segment: Segment, times: Sequence[Mapping[str, Any]]) -> str:
    if not times:
        return "<p class='none'>Not recorded.</p>"

    def series(value: Any) -> list[tuple[int, float | None]]:
        return [(line["step"], value(line)) for line in times]

    rate = series(lambda line: line["samples"] / line["seconds"])
    wait = series(lambda line: 100 * line["wait"] / line["seconds"])
    memory = series(lambda line: line["memory"] / 1e9)
    return "".join(
        (
            curves("samples a second", {"samples/s": rate}),
            curves("waiting for samples, share of a step", {"percent": wait}),
            _parts(times),
            _flops(segment, times),
            curves("most memory of the GPU, or of this process", {"GB": memory}),
        )
    )


def _parts(times: Sequence[Mapping[str, Any]]) -> str:
    """Returns how long the device took for each part of a step, as curves and as shares."""
    recorded = [line for line in times if line.get("parts")]
    if not recorded:
        return ""
    series = {
        part: [(line["step"], 1e3 * line["parts"][part]) for line in recorded] for part in PARTS
    }
    whole = sum(line["seconds"] * line["steps"] for line in recorded)
    shares = {
        part: sum(line["parts"][part] * line["steps"] for line in recorded) / whole
        for part in PARTS
    }
    text = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
    rest = 1 - sum(shares.values())
    note = (
        f"<p>Of the time in steps: {text}, waiting for samples and the rest {rest:.0%}. "
        "<code>bench.train</code> measures the same parts beside the bare UNet.</p>"
    )
    return curves("parts of a step, ms", series) + note


def _flops(segment: Segment, times: Sequence[Mapping[str, Any]]) -> str:
    """Returns how many floating-point operations the UNet made in a second, since the last
    start.
    """
    own = [line for line in times if line["step"] > segment.step]
    if not own or not segment.sample_flops:
        return ""
    seconds = sum(line["seconds"] * line["steps"] for line in own)
    flops = segment.sample_flops * sum(line["samples"] * line["steps"] for line in own) / seconds
    config = segment.config()
    text = (
        f"The UNet, forward and backward, takes {segment.sample_flops / 1e12:.3g} TFLOP for a "
        f"square sample of {config.resolution} pixels: in the steps since the last start "
        f"{flops / 1e12:.3g} TFLOP/s"
    )
    peak = segment.processes * peak_flops(segment.device, config.mixed_precision)
    if peak:
        text += (
            f", which is {flops / peak:.0%} of the peak of {segment.processes} × {segment.device} "
            f"({peak / 1e12:,.0f} TFLOP/s): the model FLOPs utilisation"
        )
    return f"<p>{escape(text)}.</p>"


def _bad_samples(output: Path) -> str:
    sections = []
    for title, name, columns in (
        ("Samples that were left out", SKIPPED, ("step", "key", "shard", "reason")),
        ("Updates that were skipped", NONFINITE, ("step", "keys")),
        ("Spikes of the noise loss", SPIKES, ("step", "loss", "expected")),
    ):
        lines = [*read_lines(output / name)]
        rows = [[_text(line.get(column)) for column in columns] for line in lines[-_ROWS:]]
        more = f", the last {_ROWS} of {len(lines):,}" if len(lines) > _ROWS else ""
        table = _table(columns, rows) if rows else "<p class='none'>None.</p>"
        sections.append(f"<h2>{title}{more}</h2>{table}")
    return "".join(sections)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table>{f'<tr>{head}</tr>' if head else ''}{body}</table>"
