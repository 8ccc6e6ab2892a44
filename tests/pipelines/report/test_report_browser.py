"""The report's page in a real Chromium without a network: opened, filtered, searched, toggled,
driven by keys.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pyarrow.parquet as pq
import pytest

from pipelines.report import write_report
from pipelines.report.palette import PALETTE
from stages.regions import LABEL_IDS
from stages.storage.layout import REPORT, STATS
from tests.pipelines.report.helpers import rows_of
from tests.pipelines.report.report_data import EVIL, EVIL_IMAGE, EVIL_MORE, Recipe, write_set

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    not CHROMIUM and "CI" not in os.environ, reason="needs chromium; CI fails without"
)
FLAGS = [
    *(
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ),
    *("--disable-component-update", "--disable-sync"),
]
WIDE, NARROW = {"width": 1300, "height": 900}, {"width": 400, "height": 800}

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_set(
        tmp_path_factory.mktemp("made") / "out", Recipe(shards=4, rows=90, odd=(2,), hostile=True)
    )
    write_report(str(folder))
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any, made: Path) -> Iterator[Open]:
    """Opens the page at a hash; afterwards there must have been no complaint, no dialog and no
    request but for it.
    """
    complaints: list[str] = []
    contexts = []

    def opened(at: str = "", folder: Path = made, **options: Any) -> Any:
        context = browser.new_context(offline=True, **({"viewport": WIDE} | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        url = (folder / REPORT).as_uri()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "dialog",
            lambda dialog: complaints.append(f"dialog {dialog.message}") or dialog.dismiss(),
        )
        page.on(
            "request",
            lambda request: request.url.split("#")[0] == url or complaints.append(request.url),
        )
        page.goto(url + at)
        page.wait_for_selector("html[data-ready]")
        return page

    yield opened
    for context in contexts:
        assert context.pages[0].evaluate("window.evil === undefined")
        context.close()
    assert not complaints


def count(page: Any) -> str:
    page.wait_for_function("() => document.getElementById('count').textContent !== ''")
    return str(page.inner_text("#count"))


def wait_count(page: Any, text: str) -> None:
    page.wait_for_function(
        "text => document.getElementById('count').textContent === text", arg=text
    )


def records(number: int) -> str:
    return f"{number:,} record{'s' if number != 1 else ''}"


def every_link(page: Any) -> dict[str, str]:
    """href → text of all numbers that can be clicked, with every list of bins opened."""
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.wait_for_timeout(300)
    pairs = page.eval_on_selector_all(
        "a.count", "all => all.map(a => [a.getAttribute('href'), a.textContent])"
    )
    return dict(pairs)


VISIT = """async (links) => {
  const counts = {}, grid = document.getElementById("grid");
  for (const link of links) {
    location.hash = link;
    while (grid.dataset.shown !== location.hash) await new Promise((done) => setTimeout(done));
    counts[link] = document.getElementById("count").textContent;
  }
  return counts;
}"""


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
        href.startswith("#pictures?status=dropped&stage=quality_filter&reason=blurred")
        for href in links
    )


def test_a_number_is_clicked_and_its_pictures_are_there(open_page: Open, made: Path) -> None:
    page = open_page()
    blurred = [row for row in rows_of(made) if row["reason"] == "blurred"]
    page.click("#reasons tr:has-text('blurred') a.count")
    wait_count(page, records(len(blurred)))
    page.wait_for_selector(".sample canvas[data-labels]")
    keys = page.eval_on_selector_all(".sample", "all => all.map(e => e.dataset.key)")
    assert keys == [row["key"] for row in blurred]
    assert page.inner_text("#chips").count("×") == 3
    page.click("#chips button:has-text('stage')")
    page.click("#chips button:has-text('reason')")
    wait_count(page, records(sum(row["status"] == "dropped" for row in rows_of(made))))
    page.go_back()
    page.go_back()
    page.go_back()
    page.wait_for_selector("#figures-view", state="visible")


def test_a_bar_is_clicked_and_its_pictures_are_there(open_page: Open, made: Path) -> None:
    page = open_page()
    chart = page.locator("[data-figure=yaw][data-chart]")
    chart.scroll_into_view_if_needed()
    page.wait_for_selector("[data-figure=yaw][data-drawn]")
    found = json.loads((made / STATS).read_text())["data"]["metrics"]["yaw"]
    fullest = max(range(len(found["counts"])), key=lambda at: found["counts"][at])
    assert chart.locator(".bars .point").count() == len(found["counts"])
    chart.locator(".bars .point").nth(fullest).hover(force=True)
    page.mouse.down()
    page.mouse.up()
    wait_count(page, records(found["counts"][fullest]))
    low, high = found["edges"][fullest : fullest + 2]
    inside = [
        row["key"] for row in rows_of(made) if row["status"] == "ok" and low <= row["yaw"] < high
    ]
    assert page.get_attribute(".sample >> nth=0", "data-key") == inside[0]
    assert len(inside) == found["counts"][fullest]


def test_every_chart_is_drawn(open_page: Open) -> None:
    page = open_page()
    assert page.locator("[data-chart]").count() > 30
    for chart in page.locator("[data-chart]").all():
        chart.scroll_into_view_if_needed()
        chart.locator("svg.main-svg").first.wait_for(state="attached")
    page.wait_for_function(
        "() => document.querySelectorAll('[data-chart]:not([data-drawn])').length === 0"
    )
    page.select_option("#track", "brightness")
    assert page.locator("#flags tr").count() == 3
    page.click("#shard-head button:has-text('flags')")
    assert page.inner_text("#shard-rows tr >> nth=0").startswith("fgid-000002")


def test_search_and_filters_agree_with_the_sidecars(open_page: Open, made: Path) -> None:
    page, rows = open_page("#pictures"), rows_of(made)
    assert count(page) == records(len(rows))
    page.keyboard.press("/")
    page.keyboard.type("grey OUTDOORS")
    hits = [row for row in rows if "grey" in row["caption"] and "outdoors" in row["caption"]]
    assert 0 < len(hits) < len(rows)
    wait_count(page, records(len(hits)))
    assert "q=grey+OUTDOORS" in page.url
    page.select_option("select[data-filter=status]", "ok")
    wait_count(page, records(sum(row["status"] == "ok" for row in hits)))
    page.select_option("select[data-filter=shard]", "fgid-000001")
    page.click("text=clear all")
    wait_count(page, records(len(rows)))
    page.select_option("select[data-filter=missing]", "nose")
    nose = [
        row for row in rows if row["label_areas"] and row["label_areas"][LABEL_IDS["nose"]] == 0
    ]
    wait_count(page, records(len(nose)))
    page.fill("#search", rows[7]["key"])
    page.click("#chips button:has-text('lacks')")
    wait_count(page, records(1))
    again = open_page("#" + page.url.split("#")[1])
    wait_count(again, records(1))
    again.fill("#search", "no such words anywhere")
    wait_count(again, records(0))
    assert again.is_visible("#nothing")


def pixels(page: Any, selector: str) -> list[int]:
    found: list[int] = page.eval_on_selector(
        selector,
        """c => {
          const copy = new OffscreenCanvas(c.width, c.height).getContext("2d", { willReadFrequently: true });
          copy.drawImage(c, 0, 0);
          return [...copy.getImageData(0, 0, c.width, c.height).data];
        }""",
    )
    return found


def test_the_overlay_is_toggled_by_region(open_page: Open, made: Path) -> None:
    page = open_page("#pictures?status=ok")
    page.wait_for_selector(".sample canvas[data-labels]")
    page.evaluate("document.getElementById('strength').value = 100")
    page.dispatch_event("#strength", "input")
    page.keyboard.press("o")
    page.wait_for_timeout(150)
    bare = pixels(page, ".sample canvas")
    for number, part in ((4, "nose"), (3, "left_eye"), (6, "hair")):
        page.keyboard.press("o") if page.is_checked("[data-part=ears]") else None
        for box in page.locator(".controls [data-part]").all():
            if box.is_checked():
                box.uncheck()
        page.keyboard.press(str(number))
        page.wait_for_timeout(150)
        seen = pixels(page, ".sample canvas")
        colour = list(bytes.fromhex(PALETTE[LABEL_IDS[part]][1:]))
        changed = [at for at in range(0, len(seen), 4) if seen[at : at + 3] != bare[at : at + 3]]
        exact = [
            at
            for at in changed
            if max(abs(a - b) for a, b in zip(seen[at : at + 3], colour, strict=True)) <= 2
        ]
        row = next(row for row in rows_of(made) if row["status"] == "ok")
        labels = decoded(row["thumbnail_labels"])
        expected = labels.count(LABEL_IDS[part])
        assert len(exact) == expected > 10, part
        assert page.locator(".controls [data-part]:checked").count() == 1
    page.keyboard.press("b")
    assert page.is_checked(".controls [data-boxes]")


def decoded(png: bytes) -> list[int]:
    import io

    from PIL import Image

    return list(Image.open(io.BytesIO(png)).tobytes())


def test_keys_move_open_and_close(open_page: Open, made: Path) -> None:
    page, rows = open_page("#pictures"), rows_of(made)
    focused = "document.activeElement.dataset.index"
    page.wait_for_selector(".sample")
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"() => {focused} === '0'")
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"() => {focused} === '1'")
    page.keyboard.press("ArrowDown")
    columns = page.evaluate(f"Number({focused})") - 1
    page.wait_for_function(f"() => Number({focused}) > 2")
    columns = page.evaluate(f"Number({focused})") - 1
    page.keyboard.press("End")
    page.wait_for_function(f"() => {focused} === '{len(rows) - 1}'")
    assert page.locator(".sample").count() < 120, "only the cards in view exist"
    page.keyboard.press("ArrowUp")
    page.wait_for_function(f"() => {focused} === '{len(rows) - 1 - columns}'")
    page.keyboard.press("Enter")
    page.wait_for_selector("#detail[open]")
    at = len(rows) - 1 - columns
    assert page.inner_text("#detail-title") == rows[at]["source"]
    assert f"at={rows[at]['key']}" in page.url
    page.keyboard.press("j")
    page.wait_for_function(
        f"() => document.getElementById('detail-place').textContent.startsWith('{at + 2:,} of')"
    )
    page.keyboard.press("k")
    page.keyboard.press("k")
    page.wait_for_function(
        f"() => document.getElementById('detail-place').textContent.startsWith('{at:,} of')"
    )
    page.keyboard.press("Escape")
    page.wait_for_selector("#detail:not([open])", state="attached")
    page.wait_for_function(f"() => {focused} === '{at - 1}'")
    page.keyboard.press("?")
    page.wait_for_selector("#help[open]")
    page.keyboard.press("?")
    page.wait_for_selector("#help:not([open])", state="attached")


def test_a_record_shows_all_that_is_known_of_it(open_page: Open, made: Path) -> None:
    rows = {row["key"]: row for row in rows_of(made)}
    near = {row["key"]: row for row in pq.read_table(made / "identities.parquet").to_pylist()}
    wanted = [
        k for k, row in near.items() if row["identity_size"] > 1 and rows[k]["caption"] != EVIL
    ]
    key = next(k for k in wanted if {"fused", "caption_too_long"} <= {*rows[k]["regions"]})
    row = rows[key]
    page = open_page(f"#pictures?at={key}")
    page.wait_for_selector("#detail[open]")
    text = page.inner_text("#detail-words")
    for known in (
        row["caption"],
        row["face_caption"],
        row["sha256"],
        row["author"],
        key,
        near[key]["identity_id"],
    ):
        assert re.sub(r"\s+", " ", known).strip() in re.sub(r"\s+", " ", text)
    marks = page.eval_on_selector_all("#detail-words mark", "all => all.map(m => m.textContent)")
    words = re.findall(
        r"\b(?:face|ears?|eyes?|nose|mouth)\b", f"{row['caption']} {row['face_caption']}"
    )
    assert marks == words and marks
    assert text.count("fused") == sum(status not in ("absent", "") for status in row["regions"])
    shown = page.eval_on_selector_all(
        "#detail .strip >> nth=0 >> .other", "all => all.map(b => b.dataset.key)"
    )
    assert shown == near[key]["nearest"]
    page.click("#detail .other >> nth=0")
    page.wait_for_function("source => document.getElementById('detail-title').textContent === " "source",
                           arg=rows[near[key]["nearest"][0]]["source"])  # fmt: skip


def test_strangers_words_are_text(open_page: Open, made: Path) -> None:
    evil = [row for row in rows_of(made) if row["caption"] == EVIL]
    assert len(evil) == 16
    page = open_page("#pictures?q=window.evil")
    page.wait_for_selector(".sample")
    assert page.inner_text(".sample .words >> nth=0").startswith("<script>window.evil")
    page.click(".sample >> nth=0")
    page.wait_for_selector("#detail[open]")
    shown = page.text_content("#detail-words")
    for word in (EVIL, EVIL_IMAGE, EVIL_MORE):
        assert word in shown
    assert (
        page.locator("#detail-words img, #detail-words script, .sample img, main script").count()
        == 0
    )
    page.keyboard.press("Escape")
    hostile = (
        "#pictures?q="
        + "%3Cimg%20src%3Dx%20onerror%3Dwindow.evil%3D1%3E&reason=%3Cscript%3E&constructor=x&at=__proto__"
    )
    other = open_page(hostile)
    wait_count(other, records(0))
    assert "<script>" in other.inner_text("#chips")


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
    for view in ("#", "#pictures"):
        page.evaluate("hash => { location.hash = hash; }", view)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.locator(".sample").count() >= 4
    page.click(".sample >> nth=0")
    page.wait_for_selector("#detail[open]")
    assert page.evaluate("document.getElementById('detail').getBoundingClientRect().width") <= 400
    assert page.evaluate("document.getElementById('detail').scrollWidth") <= 400


def test_ten_thousand_samples(
    open_page: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 11,000 inputs; the bound is generous, `python -m bench.report` prints what it takes on a
    quiet machine.
    """
    folder = write_set(tmp_path / "out", Recipe(shards=11, rows=1000, variants=400))
    began = time.perf_counter()
    write_report(str(folder))
    made, began = time.perf_counter() - began, time.perf_counter()
    size = (folder / REPORT).stat().st_size
    page = open_page(folder=folder)
    opened, began = time.perf_counter() - began, time.perf_counter()
    page.wait_for_selector("[data-chart][data-drawn]")
    drawn = time.perf_counter() - began
    with capsys.disabled():
        print(
            f"\n  report {made:.1f} s, {size / 1e6:.1f} MB; opened in {opened:.2f} s, first "
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
    page.evaluate("location.hash = '#pictures'")
    page.wait_for_function(
        "() => document.getElementById('count').textContent.includes('the set has 11,000')"
    )
    page.mouse.wheel(0, 100_000)
    page.wait_for_selector(".sample canvas[data-labels]")
    assert page.locator(".sample").count() < 120
