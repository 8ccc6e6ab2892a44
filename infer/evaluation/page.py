"""The page of claims: a table with each claim's values, and proof.json with the same content."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Final

from configs.errors import ConfigError
from infer.evaluation.claims import Claim, Row, claims, failed

_BAR: Final = 220  # pixels, width of a row's interval

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1000px; padding: 0 1rem;
  color: #222; background: #fff }
section { border-top: 1px solid #ddd; padding: 0.5rem 0 1rem } h2 { margin-bottom: 0 }
.verdict { float: right; padding: 0.1rem 0.7rem; border-radius: 1rem; color: #fff }
.holds { background: #1a7f37 } .fails { background: #b3261e } .reported { background: #6e7781 }
p { margin: 0.2rem 0 } td { padding: 0 1rem 0 0; font-variant-numeric: tabular-nums }
td.number { text-align: right } line { stroke: #1f6feb; stroke-width: 3 } circle { fill: #0b3d91 }
.zero { stroke: #bbb; stroke-width: 1 }
"""


def write_proof(folder: Path) -> list[str]:
    """Reads FOLDER/results/*.json, and writes FOLDER/proof.json and FOLDER/index.html. Returns the
    names of the claims that don't hold.

    Raises ConfigError if there are no results.
    """
    paths = sorted((folder / "results").glob("*.json"))
    if not paths:
        raise ConfigError(
            f"{folder / 'results'} has no results; `python -m infer.evaluation run` writes them."
        )
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    table = claims(results)
    wrong = failed(table)
    content = {"holds": not wrong, "claims": [asdict(claim) for claim in table]}
    _write(folder / "proof.json", json.dumps(content, indent=1) + "\n")
    _write(folder / "index.html", page(table))
    return wrong


def page(table: Sequence[Claim]) -> str:
    """Returns the HTML page of claims."""
    sections = "".join(_section(claim) for claim in table)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Does it learn?</title>'
        f"<style>{_STYLE}</style><h1>Does the adapter learn identity?</h1>"
        "<p>Values are means over people whom neither base nor adapter was trained on, with 95 % "
        f"intervals by bootstrap over people.</p>{sections}</html>\n"
    )


def _section(claim: Claim) -> str:
    verdict = {True: "holds", False: "fails", None: "reported"}[claim.passed]
    wanted = f"<p>Wanted: {escape(claim.wanted)}.</p>" if claim.wanted else ""
    rows = "".join(_line(row, claim.rows) for row in claim.rows)
    return (
        f"<section><span class='verdict {verdict}'>{verdict}</span><h2>{escape(claim.name)}</h2>"
        f"<p>Measured: {escape(claim.measure)}.</p>{wanted}<table>{rows}</table></section>"
    )


def _line(row: Row, rows: Sequence[Row]) -> str:
    ends = [
        value for each in rows for value in (each.low, each.high, each.mean) if value is not None
    ]
    low, high = min(0.0, *ends), max(0.0, *ends)
    spread = max(high - low, 1e-9)

    def x(value: float) -> float:
        return 4 + (value - low) / spread * (_BAR - 8)

    interval, bar = "", ""
    if row.low is not None and row.high is not None:
        interval = f"{row.low:.3f} to {row.high:.3f}"
        bar = f"<line x1='{x(row.low):.1f}' x2='{x(row.high):.1f}' y1='8' y2='8'/>"
    return (
        f"<tr><td>{escape(row.label)}</td><td class='number'>{row.mean:.3f}</td>"
        f"<td class='number'>{interval}</td><td><svg width='{_BAR}' height='16'>"
        f"<line class='zero' x1='{x(0):.1f}' x2='{x(0):.1f}' y1='0' y2='16'/>{bar}"
        f"<circle cx='{x(row.mean):.1f}' cy='8' r='4'/></svg></td></tr>"
    )


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
