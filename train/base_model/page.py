"""OUT/index.html: the losses as curves, and the pictures that show the progress."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Final

import numpy as np

from train.base_model.part import FINAL, LOSSES, PREVIEWS
from train.curves import STYLE, curves
from train.history import read_lines

_PARTS: Final = {
    "autoencoder": "Images, and below them what the autoencoder makes of their latents.",
    "towers": "Cosines of photographs (rows) and captions (columns): bright where they agree.",
    "denoiser": "Pictures of the first captions, by the averaged weights.",
}
_SHOWN: Final = 12  # rows of pictures of a part

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem;
  color: #222; background: #fff }
h2 { margin-top: 2.5rem } img { max-width: 100%; display: block; image-rendering: pixelated }
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
        f"<style>{_STYLE}{STYLE}</style><h1>Base model</h1>{''.join(sections)}</html>"
    )
    path = output / "index.html"
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(html, encoding="utf-8")
    partial.replace(path)
    return path


def _section(folder: Path, name: str, explanation: str) -> str:
    lines = [*read_lines(folder / LOSSES)]
    names = [key for key in lines[0] if key != "step"] if lines else []
    plots = "".join(
        curves(key, {key: [(line["step"], line[key]) for line in lines]}) for key in names
    )
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
        f"<h2>{escape(name.capitalize())}</h2><p>{escape(metric_line)}</p>{plots}"
        f"<p>{escape(explanation)}</p>{pictures}"
    )
