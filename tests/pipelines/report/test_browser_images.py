"""The page's image browser in Chromium: search, filters, label maps, keys, and one record."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from pipelines.report.palette import PALETTE
from stages.regions import LABEL_IDS
from tests.pipelines.report.helpers import (
    Open,
    count,
    needs_chromium,
    records,
    rows_of,
    wait_count,
)
from tests.pipelines.report.report_data import EVIL, EVIL_IMAGE, EVIL_MORE

pytestmark = needs_chromium


def test_search_and_filters_agree_with_the_sidecars(open_page: Open, browsed: Path) -> None:
    page, rows = open_page("#images"), rows_of(browsed)
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
    page.click("#chips button:has-text('without region')")
    wait_count(page, records(1))
    again = open_page("#" + page.url.split("#")[1])
    wait_count(again, records(1))
    again.fill("#search", "no such words anywhere")
    wait_count(again, records(0))
    assert again.is_visible("#nothing")


def pixels(page: Any, selector: str) -> np.ndarray:
    """The red, green and blue of each pixel of a canvas."""
    values = page.eval_on_selector(
        selector,
        """c => {
          const options = { willReadFrequently: true };
          const copy = new OffscreenCanvas(c.width, c.height).getContext("2d", options);
          copy.drawImage(c, 0, 0);
          return String.fromCharCode(...copy.getImageData(0, 0, c.width, c.height).data);
        }""",
    )
    return np.frombuffer(values.encode("latin-1"), np.uint8).reshape(-1, 4)[:, :3].astype(int)


def test_the_overlay_is_toggled_by_region(open_page: Open, browsed: Path) -> None:
    row = next(row for row in rows_of(browsed) if row["status"] == "ok")
    labels = decoded(row["thumbnail_labels"])
    page = open_page("#images?status=ok")
    page.wait_for_selector(".record canvas[data-labels]")
    page.evaluate("document.getElementById('strength').value = 100")
    page.dispatch_event("#strength", "input")
    page.keyboard.press("o")
    page.wait_for_timeout(150)
    bare = pixels(page, ".record canvas")
    for number, part in ((4, "nose"), (3, "left_eye"), (6, "hair")):
        page.keyboard.press("o") if page.is_checked("[data-part=ears]") else None
        for box in page.locator(".controls [data-part]").all():
            if box.is_checked():
                box.uncheck()
        page.keyboard.press(str(number))
        page.wait_for_timeout(150)
        seen = pixels(page, ".record canvas")
        colour = list(bytes.fromhex(PALETTE[LABEL_IDS[part]][1:]))
        changed = (seen != bare).any(1)
        exact = changed & (abs(seen - colour) <= 2).all(1)
        assert exact.sum() == labels.count(LABEL_IDS[part]) > 10, part
        assert page.locator(".controls [data-part]:checked").count() == 1
    page.keyboard.press("b")
    assert page.is_checked(".controls [data-boxes]")


def decoded(png: bytes) -> list[int]:
    return list(Image.open(io.BytesIO(png)).tobytes())


def test_keys_move_open_and_close(open_page: Open, browsed: Path) -> None:
    page, rows = open_page("#images"), rows_of(browsed)
    focused = "document.activeElement.dataset.index"
    page.wait_for_selector(".record")
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
    assert page.locator(".record").count() < 120, "only the cards in view exist"
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


def test_a_record_shows_everything_recorded_of_it(open_page: Open, browsed: Path) -> None:
    rows = {row["key"]: row for row in rows_of(browsed)}
    near = {row["key"]: row for row in pq.read_table(browsed / "identities.parquet").to_pylist()}
    wanted = [
        k
        for k, row in near.items()
        if row["identity_size"] > 1 and rows[k]["caption"] != EVIL and rows[k]["person"]
    ]
    key = next(k for k in wanted if {"fused", "caption_too_long"} <= {*rows[k]["regions"]})
    row = rows[key]
    page = open_page(f"#images?at={key}")
    page.wait_for_selector("#detail[open]")
    text = page.inner_text("#detail-words")
    for expected in (
        row["caption"],
        row["face_caption"],
        row["sha256"],
        row["author"],
        row["person"],
        key,
        near[key]["identity_id"],
    ):
        assert re.sub(r"\s+", " ", expected).strip() in re.sub(r"\s+", " ", text)
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
    page.wait_for_function(
        "source => document.getElementById('detail-title').textContent === source",
        arg=rows[near[key]["nearest"][0]]["source"],
    )


def test_text_from_outside_is_shown_as_text(open_page: Open, browsed: Path) -> None:
    evil = [row for row in rows_of(browsed) if row["caption"] == EVIL]
    assert len(evil) == 16
    page = open_page("#images?q=window.evil")
    page.wait_for_selector(".record")
    assert page.inner_text(".record .words >> nth=0").startswith("<script>window.evil")
    page.click(".record >> nth=0")
    page.wait_for_selector("#detail[open]")
    shown = page.text_content("#detail-words")
    for word in (EVIL, EVIL_IMAGE, EVIL_MORE):
        assert word in shown
    assert (
        page.locator("#detail-words img, #detail-words script, .record img, main script").count()
        == 0
    )
    page.keyboard.press("Escape")
    hostile = (
        "#images?q=%3Cimg%20src%3Dx%20onerror%3Dwindow.evil%3D1%3E&reason=%3Cscript%3E"
        "&constructor=x&at=__proto__"
    )
    other = open_page(hostile)
    wait_count(other, records(0))
    assert "<script>" in other.inner_text("#chips")
