"""The report: its figures recompute from the shards, and its page runs nothing that came with them."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
import shutil
import statistics
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import ShardError
from pipelines.report import compute_stats, images_per_second, write_report
from pipelines.report.distribution import Sums, spread
from pipelines.report.drift import Track, flags
from pipelines.report.samples import read_samples
from pipelines.report.stats import compute
from pipelines.report.text import number, percent
from pipelines.run import run
from stages.regions import LABELS, REGION_WORDS
from stages.storage.layout import REPORT, STATS, STATS_TABLE
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.pipelines.helpers import config
from tests.pipelines.report.report_data import EVIL, EVIL_IMAGE, Recipe, write_set, write_shard
from tests.pipelines.report.report_recompute import (
    FIGURES,
    check_data,
    rates,
    shard_rows,
    status_of,
    values,
    written,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Five shards of 120, one of them dark and blurred, with hostile words in them."""
    folder = tmp_path_factory.mktemp("made") / "out"
    store = Store(str(write_set(folder, Recipe(shards=5, rows=120, odd=(3,), hostile=True))))
    write_report(store)
    return store


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, poisoned: Path) -> Store:
    """The poisoned set through the real stages, in shards of four."""
    output = tmp_path_factory.mktemp("real")
    run(config(poisoned, output))
    write_report(str(output))
    return Store(str(output))


def small(folder: Path, **changes: Any) -> Store:
    return Store(
        str(write_set(folder / "out", Recipe(**{"shards": 1, "rows": 30, "variants": 4} | changes)))
    )


def stats_of(store: Store) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(store.read(STATS))
    return found


# --------------------------------------------------------------------------------- figures, recompu


def test_every_figure_recomputes_from_the_shards(made: Store) -> None:
    check_data(stats_of(made)["data"], Path(made.root))


def test_every_figure_recomputes_from_real_shards(real: Store) -> None:
    check_data(stats_of(real)["data"], Path(real.root))


def test_the_table_of_shards_recomputes(made: Store) -> None:
    table = pq.read_table(Path(made.root) / STATS_TABLE).to_pylist()
    for row, (name, rows) in zip(table, shard_rows(Path(made.root)).items(), strict=True):
        assert row["shard"] == name
        for figure in FIGURES:
            numbers = values(written(rows), figure)
            assert row[f"{figure}_count"] == len(numbers) > 0
            assert row[f"{figure}_mean"] == math.fsum(numbers) / len(numbers)
            assert row[f"{figure}_median"] == statistics.median(numbers)
        assert {share: row[share] for share in rates([])} == {
            s: some / n for s, (some, n) in rates(rows).items()
        }
        manifest = json.loads(made.read(f"shards/{name}.json"))
        assert row["seconds"] == manifest["run"]["seconds"]
        assert row["seconds_parse"] == manifest["run"]["stage_seconds"]["parse"]


def test_the_odd_shard_is_flagged_and_no_other(made: Store) -> None:
    drift = stats_of(made)["data"]["drift"]
    flagged = {
        name: [flag["shard"] for flag in entry["flagged"]]
        for name, entry in drift.items()
        if entry["flagged"]
    }
    assert flagged == {"sharpness": ["fgid-000003"], "brightness": ["fgid-000003"]}


@pytest.mark.parametrize("size", [50, 1000])
def test_honest_shards_are_not_flagged_however_small(size: int) -> None:
    """A thousand small shards of one source beside a thousand large ones: chance alone flags none
    in a thousand.
    """
    rng, counts = np.random.default_rng(size), np.repeat([size, 1000], 1000)
    normal = np.array([np.median(rng.normal(size=n)) for n in counts])
    shares = np.array([rng.binomial(n, 0.8) / n for n in counts])
    names = [str(at) for at in range(2000)]
    for track in (Track("x", normal, counts, 1.349), Track("y", shares, counts, None)):
        entry, _ = flags(track, names)
        assert len(entry["flagged"]) <= 2
        moved = np.append(track.values[1:], track.values[0] + (1.349 if track.scale else -0.4))
        assert "1999" in [
            flag["shard"]
            for flag in flags(Track("z", moved, counts, track.scale), names)[0]["flagged"]
        ]


def test_where_nothing_varies_whatever_differs_is_flagged() -> None:
    track = Track("x", np.array([1.0] * 9 + [2.0]), np.full(10, 60), 0.0)
    entry, away = flags(track, list("abcdefghij"))
    assert entry["flagged"] == [{"shard": "j", "value": 2.0, "away": None, "count": 60}]
    assert away[:9].tolist() == [0.0] * 9


def test_equal_outputs_give_equal_reports(made: Store, tmp_path: Path) -> None:
    before = [made.read(name) for name in (STATS, STATS_TABLE, REPORT)]
    shutil.copytree(made.root, tmp_path / "elsewhere")
    write_report(str(tmp_path / "elsewhere"))
    assert [
        (tmp_path / "elsewhere" / name).read_bytes() for name in (STATS, STATS_TABLE, REPORT)
    ] == before


def test_time_counts_only_while_a_shard_is_made(made: Store, tmp_path: Path) -> None:
    store = small(tmp_path, shards=4)
    spans = {0: (10.0, 4.0), 1: (12.0, 4.0), 2: (110.0, 5.0), 3: (111.0, 2.0)}  # finished, seconds
    for index, (finished, seconds) in spans.items():
        path = Path(store.path(f"shards/fgid-{index:06d}.json"))
        manifest = json.loads(path.read_text())
        manifest["run"] |= {
            "finished": finished,
            "seconds": seconds,
            "stage_seconds": {"source": 0.25, "parse": 0.75},
        }
        path.write_text(json.dumps(manifest))
    runs = compute_stats(store)["runs"]
    assert runs["seconds"] == 12.0  # 6 to 12 and 105 to 111: the hour at lunch is no work
    assert runs["images_per_second"] == round(4 * 30 / 12, 3)
    # of a run that resumed
    second = [
        manifest
        for manifest in DatasetReader(store).manifests().values()
        if manifest.run.finished > 100
    ]
    assert images_per_second(second) == round(60 / 6, 3)
    assert runs["stage_seconds"] == {"source": 1.0, "parse": 3.0}
    assert runs["stage_share"] == {"source": 0.25, "parse": 0.75}


@pytest.mark.parametrize(
    "change", [{"written": 8}, {"inputs": 10}, {"dropped": {"no_face": 1}}, {"failed": {"x": 1}}]
)
def test_a_ledger_that_does_not_balance_is_an_error(tmp_path: Path, change: dict[str, Any]) -> None:
    store = small(tmp_path)
    path = Path(store.path("shards/fgid-000000.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ShardError, match=r"fgid-000000 doesn't balance"):
        write_report(store)
    assert not store.exists(REPORT)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no committed shard"):
        write_report(str(tmp_path / "empty"))
    store = small(tmp_path)
    sidecar = Path(store.path("shards/fgid-000000.parquet"))
    pq.write_table(pq.read_table(sidecar).drop_columns(["status"]), sidecar)
    with pytest.raises(ShardError, match="fgid-000000: its sidecar has no column status"):
        write_report(store)
    sidecar.unlink()
    with pytest.raises(ShardError, match=r"fgid-000000\.parquet is missing"):
        write_report(store)


def test_columns_that_a_sidecar_lacks_have_no_values(tmp_path: Path) -> None:
    """As in a data set whose chain has fewer stages, or that an older program wrote."""
    store = small(tmp_path, shards=2)
    sidecar = Path(store.path("shards/fgid-000001.parquet"))
    lacking = ["sharpness", "license", "trainable", "regions", "region_words", "label_areas"]
    pq.write_table(pq.read_table(sidecar).drop_columns(lacking), sidecar)
    data = write_report(store).stats["data"]
    ok, others = (written(rows) for rows in shard_rows(Path(store.root)).values())
    assert data["metrics"]["sharpness"]["count"] == len(ok)
    assert data["metrics"]["brightness"]["count"] == len(ok) + len(others)
    assert data["trainable"]["unknown"] == len(others)
    stated = {entry["name"]: entry["count"] for entry in data["licenses"]["named"]}
    assert stated == Counter(row["license"] for row in ok) + Counter({"": len(others)})


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"time": "", "by": "hash", "inputs": 1, "removed": {}, "note": "", "sha256": []}'],
)
def test_a_takedown_that_can_not_be_read_is_an_error(tmp_path: Path, line: str) -> None:
    store = small(tmp_path)
    with Path(store.path("takedown.jsonl")).open("a") as log:
        log.write(line + "\n")
    with pytest.raises(ShardError, match=r"line 2 of takedown\.jsonl"):
        compute_stats(store)


def test_a_data_set_without_a_sample_still_has_its_report(tmp_path: Path) -> None:
    store = small(tmp_path)
    table = pq.read_table(store.path("shards/fgid-000000.parquet"))
    ended = table.filter(pa.compute.not_equal(table["status"], "ok"))
    write_shard(Path(store.root), 0, ended, np.random.default_rng(0))
    Path(store.path("identities.parquet")).unlink()
    write_report(store)
    assert "no samples" in Page(store).text
    assert "Samples were not grouped by identity." in Page(store).text
    check_data(stats_of(store)["data"], Path(store.root))


@given(
    st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=60), st.booleans()
)
def test_a_histogram_holds_every_value_once(numbers: list[float], whole: bool) -> None:
    numbers = [float(round(value)) for value in numbers] if whole else numbers
    found = spread(np.sort(numbers), math.fsum(numbers), whole=whole)
    edges, counts = found["edges"], found["counts"]
    assert edges == sorted(set(edges))
    assert edges[0] <= min(numbers) <= max(numbers) < edges[-1]
    assert sum(counts) == len(numbers) and len(counts) <= 26
    assert counts == [
        sum(a <= value < b for value in numbers) for a, b in itertools.pairwise(edges)
    ]
    assert not whole or all(float(edge).is_integer() for edge in edges)


@given(
    st.lists(st.lists(st.none() | st.floats(-1e300, 1e300), min_size=3, max_size=3), max_size=30),
    st.integers(1, 5),
)
def test_sums_are_exact_in_any_order_and_merge(rows: list[list[float | None]], parts: int) -> None:
    matrix = np.array(rows, float).reshape(-1, 3).T  # None becomes NaN
    sums = Sums(3)
    for part in np.array_split(matrix[:, ::-1], parts, axis=1):
        assert sums.add(part) == [math.fsum(row[~np.isnan(row)]) for row in part]
    assert sums.totals() == [math.fsum(row[~np.isnan(row)]) for row in matrix]


# --------------------------------------------------------------------------------------- records on


def test_records_are_spread_evenly_and_examples_are_among_them(made: Store) -> None:
    report = compute(DatasetReader(made))
    records = read_samples(
        DatasetReader(made),
        report.manifests,
        report.examples,
        100,
        report.metrics,
        report.columns,
    )
    shards = Counter(records.columns["shard"])
    assert all(shards[index] >= 20 for index in range(5)), "each shard's fifth, and the examples"
    assert len(set(records.columns["key"])) == len(records) < 300
    rows = {row["key"]: row for part in shard_rows(Path(made.root)).values() for row in part}
    for entry in report.stats["data"]["reasons"]:
        reason = [key for key, r in rows.items() if r["reason"] == entry["reason"]]
        assert set(reason[:8]) <= set(records.columns["key"])
    for at, key in enumerate(records.columns["key"]):
        row = rows[key]
        assert records.pictures[at] == (row["thumbnail"], row["thumbnail_labels"])
        assert records.columns["caption"][at] == row["caption"]
        lacking = sum((share == 0) << label for label, share in enumerate(row["label_areas"]))
        assert records.columns["missing"][at] == (lacking if row["label_areas"] else -1)
    whole = read_samples(
        DatasetReader(made),
        report.manifests,
        report.examples,
        10_000,
        report.metrics,
        report.columns,
    )
    assert whole.columns["key"] == list(rows), "of a small set all, in its order"


# ------------------------------------------------------------------------------------------------ t


class Page(HTMLParser):
    """index.html, parsed: tags with attributes, the text that is shown, tables by id, scripts with
    their types.
    """

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


def test_the_numbers_shown_are_those_of_the_shards(made: Store) -> None:
    page, rows = Page(made), [row for part in shard_rows(Path(made.root)).values() for row in part]
    ok = written(rows)
    scales = dict.fromkeys(
        ("clipped", "occlusion", "cut", *(f"area_{word}" for word in REGION_WORDS)), 100
    )
    for figure in FIGURES:
        numbers, scale = values(ok, figure), scales.get(figure, 1)
        shown = page.lists[figure]
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
    assert f"{len(ok)} samples of {len(rows)} photographs" in page.text
    assert page.tables["funnel"][-2][3] == str(len(ok))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0, "0"),
        (1234, "1,234"),
        (-0.04163, "−0.042"),
        (12.345, "12.3"),
        (3.456, "3.46"),
    ],
)
def test_numbers_as_text(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_words_from_outside_are_text_and_only_two_scripts_may_run(made: Store) -> None:
    page, html = Page(made), made.read(REPORT).decode()
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


def test_the_page_needs_nothing_from_anywhere(made: Store) -> None:
    links = [
        a[name]
        for _, a in Page(made).tags
        for name in ("src", "href", "srcset", "action", "data")
        if name in a
    ]
    assert len(links) > 100
    assert all(
        (link or "").startswith(("data:", "#")) or link in ("stats.json", "stats.parquet")
        for link in links
    )
    style = re.search(r"<style>(.*?)</style>", made.read(REPORT).decode(), re.S)
    assert style and "url(" not in style[1] and "@import" not in style[1]


@pytest.mark.parametrize(
    "content", ["[1, 2", "[]", '{"weights": "none", "source": null}', '{"weights": [1, {}]}']
)
def test_any_dataset_json_will_do(tmp_path: Path, content: str) -> None:
    store = small(tmp_path)
    store.write("dataset.json", content)
    write_report(store)
    assert "of 30 photographs" in Page(store).text


def test_an_unfinished_output_says_so(tmp_path: Path) -> None:
    store = small(tmp_path, shards=3)
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
