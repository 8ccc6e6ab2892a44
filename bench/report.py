"""Time, memory and size of the report: `python -m bench.report` makes a data set of SHARDS × ROWS,
reports on it, and opens its page.

The sidecars are synthetic (tests/pipelines/report/report_data.py), with all columns of real ones:
embeddings of 512 numbers, captions, thumbnails of 2,000 different crops. They are written just
before, so they are read from the page cache. The page is opened in Chromium without a network.
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

# view → selector of the first chart or image that is drawn
FIRST = {"": "[data-chart][data-drawn]", "#images": ".record canvas[data-labels]"}


def main(
    shards: Annotated[int, typer.Option(help="How many shards.")] = 1000,
    rows: Annotated[int, typer.Option(help="Inputs in each.")] = 1000,
    opens: Annotated[int, typer.Option(help="How often each view is opened.")] = 5,
    folder: Annotated[
        Path | None, typer.Option(help="Keep the data set here; one that is there is used.")
    ] = None,
) -> None:
    """Prints time, memory and size of the report."""
    with tempfile.TemporaryDirectory(prefix="report-") as scratch:
        out = folder or Path(scratch) / "out"
        if not (out / "dataset.json").exists():
            write_set(
                out, Recipe(shards=shards, rows=rows, odd=(shards // 2,), dim=512, variants=2000)
            )
        began, cpu = time.perf_counter(), time.process_time()
        stats = compute(DatasetReader(str(out))).stats["data"]
        numbers, numbers_cpu = time.perf_counter() - began, time.process_time() - cpu
        began, cpu = time.perf_counter(), time.process_time()
        write_report(str(out))
        whole, whole_cpu = time.perf_counter() - began, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        size = (out / REPORT).stat().st_size / 1e6
        print(
            f"{len(stats['shards']):,} shards, {stats['inputs']:,} inputs, {stats['written']:,} "
            "written"
        )
        print(f"numbers only         {numbers:6.1f} s, {numbers_cpu:.1f} s of CPU")
        print(f"the whole report     {whole:6.1f} s, {whole_cpu:.1f} s of CPU, peak {peak:,.0f} MB")
        print(
            f"page                 {size:6.1f} MB, {min(RECORDS, stats['inputs']):,} records and "
            "examples"
        )
        for view, (ready, first) in opened(out / REPORT, opens).items():
            name = view or "statistics"
            print(
                f"{name:20} {ready:6.2f} s until it is usable, {first:.2f} s until its first chart "
                "or image"
            )


def opened(page: Path, times: int) -> dict[str, tuple[float, float]]:
    """view → median seconds from navigation until the page is ready, and until the first chart or
    image (FIRST) is drawn."""
    from playwright.sync_api import sync_playwright

    times_of = {}
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
            times_of[view] = (ready, drawn)
        browser.close()
    return times_of


WATCH = """
window.marks = [0, 0];
const wanted = ["%s", "%s"];
new MutationObserver(() => {
  for (const at of [0, 1]) {
    if (!marks[at] && document.querySelector(wanted[at])) marks[at] = performance.now();
  }
}).observe(document, {
  subtree: true, attributes: true, attributeFilter: ["data-ready", "data-drawn", "data-labels"],
});
"""


if __name__ == "__main__":
    typer.run(main)
