"""Page: the report as one HTML file that loads nothing else.

Captions, file names and details are text from outside the program. Jinja escapes them, the script
inserts them as text only, and a content security policy allows two scripts, by their digests. Large
parts are packed (gzip, base64) and unpacked when they are shown: the charting library, the records,
and the thumbnails in chunks. The page holds no time of its making, no host and no path, so equal
data sets give equal pages.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from configs.errors import ShardError
from pipelines.report import text
from pipelines.report.metrics import GROUPS, ShownMetric
from pipelines.report.page_records import PageRecords, read_page_records
from pipelines.report.palette import PALETTE
from pipelines.report.stats import Report, compute
from pipelines.sources.passed_over import PassedOver
from stages.regions import LABELS, REGION_LABELS, REGION_WORDS
from stages.storage import layout
from stages.storage.reader import DatasetReader
from stages.storage.store import Store

RECORDS: Final = 10_000  # on the page
_CHUNK: Final = 200  # records whose thumbnails are unpacked together
_FOLDER: Final = Path(__file__).parent
_SCRIPTS: Final = (
    "base.js",
    "records.js",
    "paint.js",
    "browser.js",
    "detail.js",
    "charts.js",
    "shards.js",
    "main.js",
)
_REGION_COLORS: Final = ("#35b3a2", "#e0557d", "#1f5fd6", "#f4873a", "#e63946")


def write_report(output: str | Store, records: int = RECORDS) -> Report:
    """Writes report/stats.json, stats.parquet and index.html into the data set at `output`.

    records: how many the page shows, besides examples of every reason. Raises ShardError where
    there is no shard, or a sidecar contradicts its manifest.
    """
    reader = DatasetReader(output)
    report = compute(reader)
    page_records = read_page_records(
        reader, report.manifests, report.examples, records, report.metrics, report.columns
    )
    _fill_examples(report, page_records)
    page = render(report, page_records, _dataset_info(reader))
    stats = json.dumps(report.stats, indent=1, ensure_ascii=False)
    reader.store.write(layout.STATS, stats + "\n")
    with io.BytesIO() as table:
        pq.write_table(report.shards, table, compression="zstd")
        reader.store.write(layout.STATS_TABLE, table.getvalue())
    reader.store.write(layout.REPORT, page)
    return report


def _fill_examples(report: Report, records: PageRecords) -> None:
    """Adds the first few records of each reason to the stats."""
    columns = records.columns
    by_outcome: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    outcomes = zip(columns["status"], columns["stage"], columns["reason"], strict=True)
    for at, outcome in enumerate(outcomes):
        examples = by_outcome.setdefault(outcome, [])
        if len(examples) < len(report.examples.get(outcome, ())):
            examples.append({name: columns[name][at] for name in ("key", "source", "detail")})
    for entry in report.stats["data"]["reasons"]:
        entry["examples"] = by_outcome[entry["status"], entry["stage"], entry["reason"]]


def render(report: Report, records: PageRecords, dataset: dict[str, Any]) -> str:
    """The page's HTML. dataset: the content of dataset.json, {} without one."""
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    script = _script()
    data, runs = report.stats["data"], report.stats["runs"]
    return page_template(_FOLDER).render(
        data=data,
        runs=runs,
        plan=report.stats["plan"],
        chains=report.stats["chains"],
        dataset=dataset,
        weights=_dicts(dataset.get("weights")),
        passed_over=PassedOver.from_json(dataset.get("passed_over")).lines(),
        totals={
            name: sum(shard[name] for shard in data["shards"])
            for name in ("written", "dropped", "failed")
        },
        groups=_groups(report.metrics),
        metric={shown.name: _entry(shown) for shown in report.metrics},
        regions=[
            {"word": w, "color": c} for w, c in zip(REGION_WORDS, _REGION_COLORS, strict=True)
        ],
        records=len(records),
        packed_records=Markup(_pack(_records(records))),  # noqa: S704 - base64, as are the next ones
        packed_values=Markup(_gzip(records.values.astype("<f8").tobytes())),  # noqa: S704
        chunks=[Markup(chunk) for chunk in _chunks(records)],  # noqa: S704
        packed_shards=Markup(_pack(_shards(report))),  # noqa: S704
        plotly=Markup(_plotly()[0]),  # noqa: S704
        page_data=Markup(_page_data(report, records)),  # noqa: S704 - `<` is escaped
        script=Markup(script),  # noqa: S704 - this package's own files
        style=Markup(style),  # noqa: S704
        digests=[_digest(script), _plotly()[1]],
    )


@cache
def page_template(folder: Path) -> Template:
    """Returns the page.html.j2 of a folder. It escapes all values, and has the report's filters."""
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {
        name: getattr(text, name) for name in ("number", "percent", "duration", "size", "clock")
    }
    environment.filters.update(filters, query=_query)
    return environment.get_template("page.html.j2")


def _entry(shown: ShownMetric) -> dict[str, Any]:
    """A metric as template and script read it."""
    return {"name": shown.name, **asdict(shown.metric)}


def _groups(metrics: Sequence[ShownMetric]) -> dict[str, list[dict[str, Any]]]:
    """group → its metrics. Metrics of a group that the page doesn't show are in the first one."""
    groups: dict[str, list[dict[str, Any]]] = {group: [] for group in GROUPS}
    for shown in metrics:
        groups[shown.metric.group if shown.metric.group in groups else GROUPS[0]].append(
            _entry(shown)
        )
    return groups


def _page_data(report: Report, records: PageRecords) -> str:
    """What the script reads when it starts, as JSON without "<", which could end its element."""
    data = report.stats["data"]
    page_data = {
        "metrics": [
            _entry(shown) | {"distribution": data["metrics"][shown.name]}
            for shown in report.metrics
        ],
        "identities": data["identities"],
        "funnel": data["funnel"],
        "inputs": data["inputs"],
        "written": data["written"],
        "stage_seconds": report.stats["runs"]["stage_seconds"],
        "labels": LABELS,
        "palette": PALETTE,
        "regions": [
            {
                "word": word,
                "color": color,
                "labels": [LABELS.index(name) for name in REGION_LABELS[word]],
            }
            for word, color in zip(REGION_WORDS, _REGION_COLORS, strict=True)
        ],
        "chunk": _CHUNK,
        "records": len(records),
    }
    return json.dumps(page_data, ensure_ascii=False).replace("<", "\\u003c")


def _records(records: PageRecords) -> dict[str, Any]:
    """The columns, and the sizes of each record's image and label map in its chunk, bytes."""
    sizes = [[len(part) for part in pair] for pair in records.thumbnails]
    return records.columns | {"sizes": sizes}


def _shards(report: Report) -> dict[str, Any]:
    """The rows of the table of shards, and each shard's value and distance in each metric."""
    runs = report.stats["runs"]
    drift = report.stats["data"]["drift"]
    columns = report.shards
    return {
        "rows": report.stats["data"]["shards"],
        "runs": [{k: v for k, v in run.items() if k != "finished"} for run in runs["shards"]],
        "drift": [
            {
                "name": name,
                "middle": entry["middle"],
                "flagged": [flag["shard"] for flag in entry["flagged"]],
                "away": _rounded(columns[f"{name}_away"], 2),
                "values": _rounded(columns[_value_column(name, report.metrics)], 6),
            }
            for name, entry in drift.items()
        ],
    }


def _value_column(name: str, metrics: Sequence[ShownMetric]) -> str:
    """The column of the shard table that holds the values of a series of `drift`."""
    whole = {shown.name: shown.metric.whole for shown in metrics}
    return name if name not in whole else f"{name}_{'mean' if whole[name] else 'median'}"


def _rounded(column: pa.ChunkedArray, decimals: int) -> list[float | None]:
    return [None if value is None else round(value, decimals) for value in column.to_pylist()]


def _chunks(records: PageRecords) -> Iterator[str]:
    """The thumbnails of _CHUNK records each, as base64: image, label map, image, and so on."""
    for start in range(0, len(records), _CHUNK):
        pairs = records.thumbnails[start : start + _CHUNK]
        data = b"".join(part for pair in pairs for part in pair)
        yield base64.b64encode(data).decode()


def _pack(value: Any) -> str:
    return _gzip(
        json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    )


def _gzip(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


@cache
def _plotly() -> tuple[str, str]:
    """The charting library, packed, and its digest."""
    script = get_plotlyjs()
    return base64.b64encode(gzip.compress(script.encode(), 9, mtime=0)).decode(), _digest(script)


def _script() -> str:
    parts = [(_FOLDER / "script" / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    return '"use strict";\n(() => {\n' + "\n".join(parts) + "\n})();\n"


def _digest(script: str) -> str:
    """The digest by which the content security policy allows a script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _query(count: float | None, **filters: Any) -> str:
    """The link to the records that a number counts."""
    return "#images?" + urlencode({**filters, "of": "" if count is None else int(count)})


def _dataset_info(reader: DatasetReader) -> dict[str, Any]:
    """The content of dataset.json; {} where it is damaged, as the report doesn't need it."""
    try:
        return reader.dataset_info()
    except ShardError:
        return {}


def _dicts(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
