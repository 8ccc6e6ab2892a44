"""OUT/index.html: the losses as curves, and the pictures that show the progress."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Final

import numpy as np

from train.base_model.part import FINAL, LOSSES, PREVIEWS
from train.history import read_lines

_PARTS: Final = {
    "autoencoder": "Images, and below them what the autoencoder makes of their latents.",
    "towers": "Cosines of photographs (rows) and captions (columns): bright where they agree.",
    "denoiser": "Pictures of the first captions, by the averaged weights.",
}
_WIDTH: Final = 640  # of a plot, in pixels
_HEIGHT: Final = 160
_POINTS: Final = 160  # of a curve; each is a mean
_SHOWN: Final = 12  # rows of pictures of a part

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem;
  color: #222; background: #fff }
h2 { margin-top: 2.5rem } figure { display: inline-block; margin: 0 1.5rem 1rem 0 }
figcaption { color: #555 } svg { background: #f6f6f6 } polyline { fill: none; stroke: #1f6feb;
  stroke-width: 2 } img { max-width: 100%; display: block; image-rendering: pixelated }
text { font-size: 12px; fill: #555 }
"""


def write_page(output: Path) -> Path:
    """Writes the page of a run, and returns its path."""
    sections = [
        _section(output / name, name, explanation)
        for name, explanation in _PARTS.items()
        if (output / name).is_dir()
    ]
    html = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Base model</title>'
        f"<style>{_STYLE}</style><h1>Base model</h1>{''.join(sections)}</html>"
    )
    path = output / "index.html"
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(html, encoding="utf-8")
    partial.replace(path)
    return path


def _section(folder: Path, name: str, explanation: str) -> str:
    lines = [*read_lines(folder / LOSSES)]
    names = [key for key in lines[0] if key != "step"] if lines else []
    curves = "".join(_curve(key, [(line["step"], line[key]) for line in lines]) for key in names)
    previews = sorted((folder / PREVIEWS).glob("*.png"))
    chosen = np.unique(np.linspace(0, len(previews) - 1, _SHOWN).round().astype(int))
    pictures = "".join(
        f"<figure><img src='{folder.name}/{PREVIEWS}/{previews[index].name}' alt=''>"
        f"<figcaption>step {int(previews[index].stem):,}</figcaption></figure>"
        for index in (chosen if previews else ())
    )
    metrics = folder / FINAL / "metrics.json"
    metric_line = ""
    if metrics.is_file():
        values = json.loads(metrics.read_text(encoding="utf-8"))
        metric_line = ", ".join(f"{escape(key)} {value:g}" for key, value in values.items())
    return (
        f"<h2>{escape(name.capitalize())}</h2><p>{escape(metric_line)}</p>{curves}"
        f"<p>{escape(explanation)}</p>{pictures}"
    )


def _curve(name: str, points: list[tuple[int, float | None]]) -> str:
    """Draws means of a loss over equal numbers of steps."""
    values = np.array([np.nan if value is None else value for _, value in points])
    parts = [part for part in np.array_split(values, min(_POINTS, len(values))) if len(part)]
    means = np.array([np.nanmean(part) if not np.isnan(part).all() else np.nan for part in parts])
    means = means[~np.isnan(means)]
    if not len(means):
        return ""
    low, high = float(means.min()), float(np.quantile(means, 0.98))
    spread = max(high - low, 1e-9)
    xs = np.linspace(0, _WIDTH, len(means))
    ys = _HEIGHT - np.clip((means - low) / spread, 0, 1.05) * (_HEIGHT - 24) - 4
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    return (
        f"<figure><svg width='{_WIDTH}' height='{_HEIGHT}'><polyline points='{line}'/>"
        f"<text x='4' y='14'>{high:.4g}</text><text x='4' y='{_HEIGHT - 6}'>{low:.4g}</text></svg>"
        f"<figcaption>{escape(name)}, {points[-1][0]:,} steps</figcaption></figure>"
    )
