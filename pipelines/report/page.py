"""Page: the stats as one HTML file that needs nothing from anywhere.

Captions, file names and details come from outside: everything is escaped by Jinja, and a content security policy that
knows the one script by its digest stands behind that. Equal outputs give equal pages: no clock, no host, no path.
"""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipelines.report import figures
from pipelines.report.contact import PALETTE, Sample, contact_sheet
from pipelines.report.stats import compute_stats
from pipelines.store import Store
from stages.regions import LABELS, REGION_LABELS

INDEX = "report/index.html"
STATS = "report/stats.json"
_DATASET = "dataset.json"
_HERE = Path(__file__).parent
_STATUSES = ("written", "dropped", "failed")


def write_report(output: str | Store) -> dict[str, Any]:
    """Write report/stats.json and report/index.html into the data set at `output`; returns the stats.

    Raises ShardError if there is no shard, or one that contradicts its manifest.
    """
    store = output if isinstance(output, Store) else Store(output)
    stats = compute_stats(store)
    page = render(stats, contact_sheet(store, stats["data"]["shards"]), _dataset(store))
    store.write(STATS, json.dumps(stats, indent=1, ensure_ascii=False) + "\n")
    store.write(INDEX, page)
    return stats


def render(stats: dict[str, Any], samples: list[Sample], dataset: dict[str, Any]) -> str:
    """The page. dataset: what dataset.json says, {} if there is none."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filters = {name: getattr(figures, name) for name in ("number", "percent", "duration", "size")}
    environment.filters.update(filters, clock=_clock)
    script, style = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    data, runs = stats["data"], stats["runs"]
    return environment.get_template("page.html.j2").render(
        data=data,
        runs=runs,
        plan=stats["plan"],
        chains=stats["chains"],
        dataset=dataset,
        weights=_dicts(dataset.get("weights")),
        totals={status: sum(shard[status] for shard in data["shards"]) for status in _STATUSES},
        run_of={run["shard"]: run for run in runs["shards"]},
        charts=figures.charts(data),
        bar_lists=figures.bar_lists(data),
        stage_times=figures.stage_times(runs),
        regions=_regions(data),
        legend=_legend(data),
        samples=samples,
        script=Markup(script),  # noqa: S704 - both are this package's own files
        style=Markup(style),  # noqa: S704
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _regions(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "word": word,
            "color": PALETTE[LABELS.index(labels[-1] if word == "mouth" else labels[0])],
            "labels": [label.replace("_", " ") for label in labels],
            "missing": data["regions"][word]["missing"],
            "missing_rate": data["regions"][word]["missing_rate"],
            "mean_area": data["regions"][word]["area"]["mean"],
            "chart": figures.histogram(word, data["regions"][word]["area"], unit="%", scale=100),
        }
        for word, labels in REGION_LABELS.items()
    ]


def _legend(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Every label but the background, which the overlay leaves clear."""
    entries = []
    for label, color in list(zip(LABELS, PALETTE, strict=True))[1:]:
        missing = data["labels"][label]["missing_rate"]
        present = None if missing is None else 1 - missing
        entries.append({"name": label.replace("_", " "), "color": color, "present": present})
    return entries


def _dataset(store: Store) -> dict[str, Any]:
    """What dataset.json says, {} where it is missing or isn't what it should be: the report doesn't hang on it."""
    try:
        found = json.loads(store.read(_DATASET))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _dicts(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
