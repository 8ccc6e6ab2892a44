"""A server writes captions: what was checked is in the sidecar, the report and `inspect`."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from configs.captions import FACE_PROMPT, FACE_RETRY_PROMPT
from configs.load import load_text
from configs.schema import DatasetConfig
from pipelines.inspect.find import inspect
from pipelines.inspect.tables import show
from pipelines.report import write_report
from pipelines.run import execute, plan_job
from stages.storage import layout
from stages.storage.reader import DatasetReader
from tests.pipelines.helpers import count_model_calls, rows_of
from tests.stages.chat_server import ChatServer, Reply, Request, completion

CAPTION = "A person with curly hair looks at the camera."
BALD = "A bald person looks at the camera."
FACE = "The face is oval, the eyes are open, the nose is small, and the lips are thin."


def answer(request: Request) -> Reply:
    """Every caption has a preamble. Of some images, the caption is false and the face caption a
    refusal at first.
    """
    plain = request.jpeg[-20] % 2 == 0
    if request.prompt == FACE_RETRY_PROMPT or (request.prompt == FACE_PROMPT and plain):
        return completion(request, text=FACE)
    if request.prompt == FACE_PROMPT:
        return completion(request, text="I'm sorry, I can't describe faces.")
    return completion(request, text=f"Sure! {CAPTION if plain else BALD}")


def run(output: Path, *changes: str) -> None:
    """Runs the pipeline on a data set with changed settings, from its own samples."""
    overrides = [f"output={output}", *changes]
    config = load_text(DatasetConfig, (output / layout.CONFIG).read_text(), overrides)
    list(execute(plan_job(config), lambda count: None))
    assert plan_job(config).tasks == []


def shards(output: Path) -> dict[str, bytes]:
    files = [*output.glob("shards/*.tar"), *output.glob("shards/*.parquet")]
    return {path.name: path.read_bytes() for path in files}


def test_checks_are_recorded_and_shown(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, browser: Any
) -> None:
    output = Path(shutil.copytree(data, tmp_path / "out"))
    networks = count_model_calls(monkeypatch)
    with ChatServer(answer) as server:
        openai = f"caption.openai={{base_url: '{server.base_url}', model: m}}"
        changes = ("caption.backend=openai", openai)
        run(output, *changes)
    rows = [row for row in rows_of(output) if row["status"] == "ok"]
    tries = [row["second_tries"] for row in rows]
    assert len(rows) == 8 and 0 < sum(tries) < 8, "the test needs both"
    for row in rows:
        caption = BALD if row["second_tries"] else CAPTION
        assert (row["caption"], row["face_caption"]) == (caption, FACE)
        assert (row["answer_finish"], row["mended_answers"]) == (["stop", "stop"], 1)
        assert row["answer_verdicts"] == ["preamble", ""]
        assert row["first_verdicts"] == ["", "refusal" if row["second_tries"] else ""]

        assert row["contradicted"] == (f"bald=yes: {BALD[:-1]}" if row["second_tries"] else "")

    stats = write_report(str(output)).stats["data"]
    metrics = stats["metrics"]
    assert stats["contradicted"] == sum(tries) == 8 * metrics["contradictions"]["mean"]
    assert metrics["mended_answers"]["mean"] == 1
    assert metrics["second_tries"]["mean"] == sum(tries) / 8
    page = (output / layout.REPORT).read_text()
    assert 'data-of="second_tries"' in page and "Mended answers" in page
    link = f"#images?status=ok&amp;contradictions=1~Infinity&amp;of={sum(tries)}"
    assert link.replace("~", "%7E") in page or link in page

    tab = browser.new_page()
    tab.goto((output / layout.REPORT).as_uri() + "#images?status=ok&contradictions=1~Infinity")
    contradicted = tab.locator("#detail-words li", has_text="contradicted: bald=yes")
    for key in (row["key"] for row in rows if row["contradicted"]):
        tab.click(f".record[data-key='{key}']")
        contradicted.wait_for()
        assert contradicted.inner_text() == f"contradicted: bald=yes: {BALD[:-1]}"
        tab.keyboard.press("Escape")
    tab.close()

    console = Console(record=True, width=120, file=io.StringIO())
    key = rows[tries.index(1)]["key"]
    show(inspect(DatasetReader(str(output)).store, key), console, image=False)
    lines = console.export_text()
    assert "second tries" in lines and "first verdicts" in lines and "refusal" in lines

    before = shards(output)
    run(output, *changes, "claims.min_agreement=1")
    reasons = [row["reason"] for row in rows_of(output) if row["reason"]]
    assert reasons == ["contradicted_caption"] * sum(tries)
    run(output, *changes, "claims.min_agreement=0")
    assert shards(output) == before, "restored without another caption"
    assert networks == [], "captions are made from the shards"
