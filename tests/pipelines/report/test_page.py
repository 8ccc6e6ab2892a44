"""The page: it shows the numbers of the shards, and runs nothing that came with them."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import statistics
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.report import write_report
from pipelines.report.text import number, percent
from stages.regions import LABELS, REGION_WORDS
from stages.storage.layout import REPORT
from stages.storage.store import Store
from tests.pipelines.report.helpers import rows_of, small_set, stats_of
from tests.pipelines.report.report_data import EVIL, EVIL_IMAGE, write_shard
from tests.pipelines.report.report_recompute import METRICS, check_data, status_of, values, written


class Page(HTMLParser):
    """The parsed page: tags with attributes, visible text, tables by id, scripts with types."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[tuple[str | None, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.lists: dict[str, dict[str, str]] = {}
        self._stack: list[tuple[str, dict[str, str | None]]] = []
        self._table, self._of, self._term = "", "", ""
        self.feed(store.read(REPORT).decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self._stack.append((tag, attributes))
        if tag == "table":
            self._table = attributes.get("id") or ""
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append("")
        elif tag == "dl":
            self._of = attributes.get("data-of") or ""

    def handle_endtag(self, tag: str) -> None:
        while self._stack and self._stack.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        names = [tag for tag, _ in self._stack]
        if names and names[-1] == "script":
            self.scripts.append((self._stack[-1][1].get("type"), data))
        elif "style" not in names:
            self.text += data
            if any(name in names for name in ("td", "th")):
                self.tables[self._table][-1][-1] += data.strip()
            if "dt" in names:
                self._term = data
            elif "dd" in names and self._of:
                self.lists.setdefault(self._of, {})[self._term] = data


def test_the_numbers_shown_are_those_of_the_shards(synthetic: Store) -> None:
    page, rows = Page(synthetic), rows_of(Path(synthetic.root))
    ok = written(rows)
    scales = dict.fromkeys(
        ("clipped", "occlusion", "cut", *(f"area_{word}" for word in REGION_WORDS)), 100
    )
    for metric in METRICS:
        numbers, scale = values(ok, metric), scales.get(metric, 1)
        shown = page.lists[metric]
        middles = (
            min(numbers),
            statistics.median(numbers),
            math.fsum(numbers) / len(numbers),
            max(numbers),
        )
        expected = [number(round(value, 6) * scale) for value in middles]
        assert [shown[name] for name in ("min", "median", "mean", "max")] == expected
        assert shown["of"] == f"{len(numbers):,}"
    lost = [row for row in rows if row["reason"]]
    ended = Counter(
        (f"{row['reason'].replace('_', ' ')}, {row['status']}", row["stage"]) for row in lost
    )
    shown_reasons = {(row[0], row[1]): (row[2], row[3]) for row in page.tables["reasons"][1:]}
    assert shown_reasons == {
        end: (f"{count:,}", percent(count / len(rows))) for end, count in ended.items()
    }
    for name, missing, rate, area, *_ in page.tables["label-table"][1:]:
        shares = [row["label_areas"][LABELS.index(name.replace(" ", "_"))] for row in ok]
        present = [share for share in shares if share]
        assert (missing, rate) == (
            str(len(shares) - len(present)),
            percent(1 - len(present) / len(shares)),
        )
        assert area == percent(statistics.median(present))
    for row in page.tables["region-table"][1:]:
        word = row[0]
        statuses = Counter(status_of(entry, word) for entry in ok)
        shown = ("fused", "word_not_in_caption", "caption_too_long", "absent")
        assert row[5:] == [str(statuses[status]) for status in shown]
    assert f"{len(ok)} samples of {len(rows)} inputs" in page.text
    assert page.tables["funnel"][-2][3] == str(len(ok))


def test_text_from_outside_is_escaped_and_only_two_scripts_may_run(synthetic: Store) -> None:
    page, html = Page(synthetic), synthetic.read(REPORT).decode()
    assert EVIL in page.text and EVIL_IMAGE in page.text  # licence, detail, note; source
    assert EVIL not in html and not [tag for tag, _ in page.tags if tag == "img"]
    runnable = [data for kind, data in page.scripts if kind is None]
    assert len(runnable) == 1
    assert {kind for kind, _ in page.scripts} == {None, "application/json", "text/plain"}
    policy = next(
        a["content"] or ""
        for tag, a in page.tags
        if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert (
        f"'sha256-{base64.b64encode(hashlib.sha256(runnable[0].encode()).digest()).decode()}'"
        in policy
    )
    assert (
        "default-src 'none'" in policy
        and "unsafe-eval" not in policy
        and "connect-src" not in policy
    )
    assert re.search(r"script-src( 'sha256-[^']+'){2};", policy)
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_the_page_loads_nothing(synthetic: Store) -> None:
    links = [
        a[name]
        for _, a in Page(synthetic).tags
        for name in ("src", "href", "srcset", "action", "data")
        if name in a
    ]
    assert len(links) > 100
    assert all(
        (link or "").startswith(("data:", "#")) or link in ("stats.json", "stats.parquet")
        for link in links
    )
    style = re.search(r"<style>(.*?)</style>", synthetic.read(REPORT).decode(), re.S)
    assert style and "url(" not in style[1] and "@import" not in style[1]


@pytest.mark.parametrize(
    "content", ["[1, 2", "[]", '{"weights": "none", "source": null}', '{"weights": [1, {}]}']
)
def test_a_damaged_dataset_json_is_ignored(tmp_path: Path, content: str) -> None:
    store = small_set(tmp_path)
    store.write("dataset.json", content)
    write_report(store)
    assert "of 30 inputs" in Page(store).text


def test_an_incomplete_data_set_is_stated(tmp_path: Path) -> None:
    store = small_set(tmp_path, shards=3)
    planned = pa.table({"shard": pa.array([0] * 30 + [1] * 30 + [2] * 30, pa.int32())})
    pq.write_table(planned, store.path("plan.parquet"))
    write_report(store)
    assert "planned shards are committed" not in Page(store).text
    Path(store.path("shards/fgid-000002.json")).unlink()
    path = Path(store.path("shards/fgid-000001.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"signatures": ["other-1-00"]}))
    assert write_report(store).stats["plan"] == {"shards": 3, "inputs": 90}
    text = Page(store).text
    assert "2 of 3 planned shards are committed (60 of 90 inputs)" in text
    assert "made with 2 different configurations" in text
    assert "Identities were grouped for" in text


def test_a_data_set_without_a_sample_still_has_its_report(tmp_path: Path) -> None:
    store = small_set(tmp_path)
    table = pq.read_table(store.path("shards/fgid-000000.parquet"))
    ended = table.filter(pa.compute.not_equal(table["status"], "ok"))
    write_shard(Path(store.root), 0, ended, np.random.default_rng(0))
    Path(store.path("identities.parquet")).unlink()
    write_report(store)
    assert "no samples" in Page(store).text
    assert "Samples were not grouped by identity." in Page(store).text
    check_data(stats_of(store)["data"], Path(store.root))
