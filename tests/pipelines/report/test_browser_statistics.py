"""The page's statistics in Chromium: numbers and bars lead to their records, charts are drawn."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from pipelines.report import write_report
from stages.storage.layout import REPORT, STATS
from tests.pipelines.report.helpers import Open, needs_chromium, records, rows_of, wait_count
from tests.pipelines.report.report_data import Recipe, write_set

pytestmark = needs_chromium
NARROW = {"width": 400, "height": 800}


# Changes the address without a pause, so that the browser paints only a few of the views.
VISIT = """async (links) => {
  const counts = {}, grid = document.getElementById("grid");
  for (const link of links) {
    history.replaceState(null, "", link);
    dispatchEvent(new HashChangeEvent("hashchange"));
    for (let turn = 0; grid.dataset.shown !== location.hash; turn++)
      await (turn < 100 ? null : new Promise((done) => setTimeout(done)));
    counts[link] = document.getElementById("count").textContent;
  }
  return counts;
}"""


def every_link(page: Any) -> dict[str, str]:
    """href → text of all numbers that can be clicked, with every list of bins opened."""
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.wait_for_function("() => !document.querySelector('details.bins:not(:has(ul))')")
    pairs = page.eval_on_selector_all(
        "a.count", "all => all.map(a => [a.getAttribute('href'), a.textContent])"
    )
    return dict(pairs)


def test_every_number_shows_exactly_as_many_records(open_page: Open) -> None:
    page = open_page(viewport={"width": 400, "height": 200})  # few cards to draw
    links = every_link(page)
    assert len(links) > 400
    shown = page.evaluate(VISIT, list(links))
    for href, text in links.items():
        of = parse_qs(href.partition("?")[2]).get("of")
        if of:
            assert shown[href] == records(int(of[0])), href
            assert text == f"{int(of[0]):,}" or text.startswith("fgid-"), href
    assert any(
        href.startswith("#images?status=dropped&stage=quality_filter&reason=blurred")
        for href in links
    )


def test_a_number_is_clicked_and_its_records_are_there(open_page: Open, browsed: Path) -> None:
    page = open_page()
    blurred = [row for row in rows_of(browsed) if row["reason"] == "blurred"]
    page.click("#reasons tr:has-text('blurred') a.count")
    wait_count(page, records(len(blurred)))
    page.wait_for_selector(".record canvas[data-labels]")
    keys = page.eval_on_selector_all(".record", "all => all.map(e => e.dataset.key)")
    assert keys == [row["key"] for row in blurred]
    assert page.inner_text("#chips").count("×") == 3
    page.click("#chips button:has-text('stage')")
    page.click("#chips button:has-text('reason')")
    wait_count(page, records(sum(row["status"] == "dropped" for row in rows_of(browsed))))
    page.go_back()
    page.go_back()
    page.go_back()
    page.wait_for_selector("#statistics-view", state="visible")


def test_a_bar_is_clicked_and_its_records_are_there(open_page: Open, browsed: Path) -> None:
    page = open_page()
    chart = page.locator("[data-metric=yaw][data-chart]")
    chart.scroll_into_view_if_needed()
    page.wait_for_selector("[data-metric=yaw][data-drawn]")
    yaw = json.loads((browsed / STATS).read_text())["data"]["metrics"]["yaw"]
    fullest = max(range(len(yaw["counts"])), key=lambda at: yaw["counts"][at])
    assert chart.locator(".bars .point").count() == len(yaw["counts"])
    chart.locator(".bars .point").nth(fullest).hover(force=True)
    page.mouse.down()
    page.mouse.up()
    wait_count(page, records(yaw["counts"][fullest]))
    low, high = yaw["edges"][fullest : fullest + 2]
    inside = [
        row["key"] for row in rows_of(browsed) if row["status"] == "ok" and low <= row["yaw"] < high
    ]
    assert page.get_attribute(".record >> nth=0", "data-key") == inside[0]
    assert len(inside) == yaw["counts"][fullest]


def test_every_chart_is_drawn(open_page: Open) -> None:
    page = open_page()
    assert page.locator("[data-chart]").count() > 30
    for chart in page.locator("[data-chart]").all():
        chart.scroll_into_view_if_needed()
        chart.locator("svg.main-svg").first.wait_for(state="attached")
    page.wait_for_function(
        "() => document.querySelectorAll('[data-chart]:not([data-drawn])').length === 0"
    )
    page.select_option("#series", "brightness")
    assert page.locator("#flags tr").count() == 3
    page.click("#shard-head button:has-text('flags')")
    assert page.inner_text("#shard-rows tr >> nth=0").startswith("fgid-000002")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(open_page: Open, scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    page.wait_for_selector("[data-chart][data-drawn]")
    lightness = "(() => Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]))()"
    axis = "getComputedStyle(document.querySelector('[data-drawn] .ytick text')).fill"
    before, ticks = page.evaluate(lightness), page.evaluate(axis)
    assert (before > 200) == (scheme == "light")
    page.click("#theme")
    assert (page.evaluate(lightness) > 200) == (scheme == "dark")
    page.wait_for_function(f"before => {axis} !== before", arg=ticks)


def test_it_fits_400_pixels(open_page: Open) -> None:
    page = open_page(viewport=NARROW)
    for view in ("#", "#images"):
        page.evaluate("hash => { location.hash = hash; }", view)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.locator(".record").count() >= 4
    page.click(".record >> nth=0")
    page.wait_for_selector("#detail[open]")
    assert page.evaluate("document.getElementById('detail').getBoundingClientRect().width") <= 400
    assert page.evaluate("document.getElementById('detail').scrollWidth") <= 400


def test_ten_thousand_samples(
    open_page: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 11,000 inputs. The limits are generous; `python -m bench.report` measures the time."""
    folder = write_set(tmp_path / "out", Recipe(shards=11, rows=1000))
    began = time.perf_counter()
    write_report(str(folder))
    written, began = time.perf_counter() - began, time.perf_counter()
    size = (folder / REPORT).stat().st_size
    page = open_page(folder=folder)
    opened, began = time.perf_counter() - began, time.perf_counter()
    page.wait_for_selector("[data-chart][data-drawn]")
    drawn = time.perf_counter() - began
    with capsys.disabled():
        print(
            f"\n  report {written:.1f} s, {size / 1e6:.1f} MB; opened in {opened:.2f} s, first "
            f"chart {drawn:.2f} s later"
        )
    assert size < 40e6
    assert opened + drawn < 10
    blurred = json.loads((folder / STATS).read_text())["data"]["dropped"]["blurred"]
    page.click("#reasons tr:has-text('blurred') a.count")
    page.wait_for_function(
        "() => document.getElementById('count').textContent.startsWith('showing ')"
    )
    assert page.inner_text("#count").endswith(f" of {blurred}")
    page.evaluate("location.hash = '#images'")
    page.wait_for_function(
        "() => document.getElementById('count').textContent.includes('the data set has 11,000')"
    )
    page.mouse.wheel(0, 100_000)
    page.wait_for_selector(".record canvas[data-labels]")
    assert page.locator(".record").count() < 120
