"""Reported data sets that the tests of the report share, and their pages in a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.report import write_report
from pipelines.run import run
from stages.storage.layout import REPORT
from stages.storage.store import Store
from tests.pipelines.helpers import config
from tests.pipelines.report.helpers import Open
from tests.pipelines.report.report_data import Recipe, write_set

WIDE = {"width": 1300, "height": 900}


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Five shards of 120 inputs, one of them dark and blurred, with hostile texts in them."""
    folder = tmp_path_factory.mktemp("synthetic") / "out"
    store = Store(str(write_set(folder, Recipe(shards=5, rows=120, odd=(3,), hostile=True))))
    write_report(store)
    return store


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory, poisoned: Path) -> Store:
    """The poisoned set through the real stages, in shards of four."""
    output = tmp_path_factory.mktemp("real")
    run(config(poisoned, output))
    write_report(str(output))
    return Store(str(output))


@pytest.fixture(scope="session")
def browsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of 90 inputs, one of them dark and blurred, with hostile texts in them."""
    folder = tmp_path_factory.mktemp("browsed") / "out"
    write_report(str(write_set(folder, Recipe(shards=4, rows=90, odd=(2,), hostile=True))))
    return folder


@pytest.fixture
def open_page(browser: Any, browsed: Path) -> Iterator[Open]:
    """Opens the page of a data set at a hash, each time in another tab. Fails afterwards if there
    was a console message, an error, a dialog, or a request other than for the page."""
    complaints: list[str] = []
    addresses: set[str] = set()
    tabs: list[Any] = []
    listeners: dict[str, Callable[[Any], Any]] = {
        "console": lambda message: complaints.append(f"{message.type}: {message.text}"),
        "weberror": lambda error: complaints.append(str(error.error)),
        "dialog": lambda dialog: complaints.append(f"dialog {dialog.message}") or dialog.dismiss(),
        "request": lambda request: (
            request.url.split("#")[0] in addresses or complaints.append(request.url)
        ),
    }

    def opened(
        at: str = "", folder: Path = browsed, viewport: Any = WIDE, color_scheme: str = "light"
    ) -> Any:
        tab = next((tab for tab in browser.pages if tab not in tabs), None) or browser.new_page()
        tabs.append(tab)
        tab.bring_to_front()  # Chromium draws one frame a second in other tabs
        tab.set_default_timeout(20_000)
        tab.set_viewport_size(viewport)
        tab.emulate_media(color_scheme=color_scheme)
        address = (folder / REPORT).as_uri()
        addresses.add(address)
        tab.goto(address + at)
        tab.wait_for_selector("html[data-ready]")
        return tab

    for event, listener in listeners.items():
        browser.on(event, listener)
    try:
        yield opened
        assert all(tab.evaluate("window.evil === undefined") for tab in tabs)
    finally:
        for event, listener in listeners.items():
            browser.remove_listener(event, listener)
        for tab in tabs:
            tab.goto("about:blank")
    assert not complaints
