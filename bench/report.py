"""Time and memory of the report for a data set of SHARDS × ROWS: `python -m bench.report`.

It writes synthetic sidecars (tests/pipelines/report/report_data.py) with all columns of the
pipeline's: embeddings of 512 numbers, captions, thumbnails of 2,000 different crops. Then it makes
the report and opens its page in Chromium without a network. The sidecars were just written, so they
are read from the page cache, not from disk.
"""

from __future__ import annotations

import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from pipelines.report import write_report
from pipelines.report.page import RECORDS
from pipelines.report.stats import compute
from stages.storage.layout import REPORT
from stages.storage.reader import DatasetReader
from tests.pipelines.report.report_data import Recipe, write_set

# Fragment of a view's address → selector of what it draws first.
FIRST = {"": "[data-chart][data-drawn]", "#images": ".sample canvas[data-labels]"}


def main(
    shards: Annotated[int, typer.Option(help="Number of shards.")] = 1000,
    rows: Annotated[int, typer.Option(help="Inputs in each shard.")] = 1000,
    opens: Annotated[int, typer.Option(help="Number of times that each view is opened.")] = 5,
    folder: Annotated[
        Path | None, typer.Option(help="Write the data set here, or reuse it if it exists.")
    ] = None,
) -> None:
    """Print the time and the memory of making and opening the report."""
    with tempfile.TemporaryDirectory(prefix="report-") as scratch:
        out = folder or Path(scratch) / "out"
        if not (out / "dataset.json").exists():
            write_set(
                out, Recipe(shards=shards, rows=rows, odd=(shards // 2,), dim=512, variants=2000)
            )
        started, cpu = time.perf_counter(), time.process_time()
        stats = compute(DatasetReader(str(out))).stats["data"]
        stats_seconds, stats_cpu = time.perf_counter() - started, time.process_time() - cpu
        started, cpu = time.perf_counter(), time.process_time()
        write_report(str(out))
        report_seconds, report_cpu = time.perf_counter() - started, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        size = (out / REPORT).stat().st_size / 1e6
        print(
            f"{len(stats['shards']):,} shards, {stats['inputs']:,} inputs, {stats['written']:,} "
            "written"
        )
        print(f"statistics alone     {stats_seconds:6.1f} s, {stats_cpu:.1f} s of CPU")
        print(
            f"the whole report     {report_seconds:6.1f} s, {report_cpu:.1f} s of CPU, "
            f"peak {peak:,.0f} MB"
        )
        print(
            f"page                 {size:6.1f} MB, {min(RECORDS, stats['inputs']):,} records and "
            "examples"
        )
        for view, (ready, first) in time_page(out / REPORT, opens).items():
            print(
                f"{view or 'first view':20} {ready:6.2f} s until it can be used, {first:.2f} s "
                "until its first image or chart"
            )


def time_page(page: Path, times: int) -> dict[str, tuple[float, float]]:
    """Opens each view `times` times; returns median seconds by view.

    They count from navigation until the page is ready, and until the first of `FIRST` is drawn.
    """
    from playwright.sync_api import sync_playwright

    seconds = {}
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for view, first in FIRST.items():
            marks = []
            for _ in range(times):
                context = browser.new_context(offline=True, viewport={"width": 1300, "height": 900})
                tab = context.new_page()
                tab.add_init_script(WATCH % ("html[data-ready]", first))
                tab.goto(page.as_uri() + view)
                tab.wait_for_function("() => window.marks.every(Boolean)")
                marks.append(tab.evaluate("window.marks"))
                context.close()
            ready, drawn = (statistics.median(column) / 1000 for column in zip(*marks, strict=True))
            seconds[view] = (ready, drawn)
        browser.close()
    return seconds


# Stores in window.marks the time at which each of two selectors first matches.
WATCH = """
window.marks = [0, 0];
const selectors = ["%s", "%s"];
new MutationObserver(() => {
  for (const i of [0, 1])
    if (!marks[i] && document.querySelector(selectors[i])) marks[i] = performance.now();
}).observe(document, {
  subtree: true,
  attributes: true,
  attributeFilter: ["data-ready", "data-drawn", "data-labels"],
});
"""


if __name__ == "__main__":
    typer.run(main)
