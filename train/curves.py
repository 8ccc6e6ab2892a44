"""Curves as SVG, for the pages that a training writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

import numpy as np

_WIDTH: Final = 560  # pixels
_HEIGHT: Final = 160
_MARGIN: Final = 18  # above and below the curves, for the numbers
_POINTS: Final = 160  # of a curve; each is a mean
_COLORS: Final = ("#1f6feb", "#c2410c", "#1a7f37", "#8250df")

STYLE: Final = """
figure { display: inline-block; margin: 0 1.5rem 1rem 0; vertical-align: top; max-width: 100% }
figcaption { color: #555 } svg { background: #f6f6f6; max-width: 100%; height: auto }
polyline { fill: none; stroke-width: 2 } svg text { font: 12px system-ui, sans-serif; fill: #555 }
"""

Points = Sequence[tuple[int, float | None]]  # step and value; None where it isn't finite


def curves(title: str, series: Mapping[str, Points]) -> str:
    """Draws series over the same steps in one plot, as an HTML figure; "" if they have no values.

    Each point is the mean of equally many values. The scale leaves out the highest 2 % of them, so
    that a few spikes don't flatten the rest.
    """
    means = {name: _means(points) for name, points in series.items()}
    means = {name: line for name, line in means.items() if len(line)}
    if not means:
        return ""
    first = min(float(line[0, 0]) for line in means.values())
    last = max(float(line[-1, 0]) for line in means.values())
    values = np.concatenate([line[:, 1] for line in means.values()])
    low, high = float(values.min()), float(np.quantile(values, 0.98))
    lines, legend = [], []
    for (name, line), color in zip(means.items(), _COLORS, strict=False):
        xs = _WIDTH * (line[:, 0] - first) / max(last - first, 1)
        shares = np.clip((line[:, 1] - low) / max(high - low, 1e-9), 0, 1.05)
        ys = _HEIGHT - _MARGIN - shares * (_HEIGHT - 2 * _MARGIN)
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        lines.append(f"<polyline points='{points}' stroke='{color}'/>")
        if len(line) == 1:
            lines.append(f"<circle cx='{xs[0]:.1f}' cy='{ys[0]:.1f}' r='3' fill='{color}'/>")
        legend.append(f"<span style='color:{color}'>{escape(name)} {line[-1, 1]:.4g}</span>")
    return (
        f"<figure><svg viewBox='0 0 {_WIDTH} {_HEIGHT}' width='{_WIDTH}'>{''.join(lines)}"
        f"<text x='4' y='13'>{high:.4g}</text><text x='4' y='{_HEIGHT - 5}'>{low:.4g}</text>"
        f"<text x='{_WIDTH - 4}' y='{_HEIGHT - 5}' text-anchor='end'>step {last:,.0f}</text></svg>"
        f"<figcaption>{escape(title)}: {', '.join(legend)} at the end</figcaption></figure>"
    )


def _means(points: Points) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Returns the last step and the mean value of up to _POINTS parts, (n, 2)."""
    finite = np.array([(step, value) for step, value in points if value is not None], np.float64)
    if not len(finite):
        return finite.reshape(0, 2)
    parts = np.array_split(finite, min(_POINTS, len(finite)))
    return np.array([(part[-1, 0], part[:, 1].mean()) for part in parts])
