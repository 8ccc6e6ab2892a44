"""A server writes captions: what was checked is in the sidecar, the report and `inspect`."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from configs.captions import FACE_RETRY_PROMPT
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

CAPTION = "A person with brown hair looks at the camera."
FACE = "The face is oval, the eyes are open, the nose is small, and the mouth is closed."


def answer(request: Request) -> Reply:
    """Every caption has a preamble, every second face caption is a refusal at first."""
    if request.prompt == FACE_RETRY_PROMPT:
        return completion(request, text=FACE)
    if "nose" not in request.prompt:
        return completion(request, text=f"Sure! {CAPTION}")
    even = request.jpeg[-20] % 2 == 0
    return completion(request, text=FACE if even else "I'm sorry, I can't describe faces.")


def test_checks_are_recorded_and_shown(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(shutil.copytree(data, tmp_path / "out"))
    with ChatServer(answer) as server:
        changes = ("backend=openai", f"openai.base_url={server.base_url}", "openai.model=m")
        overrides = [f"output={output}", *(f"caption.{change}" for change in changes)]
        config = load_text(DatasetConfig, (output / layout.CONFIG).read_text(), overrides)
        networks = count_model_calls(monkeypatch)
        list(execute(plan_job(config), lambda count: None))
        assert networks == [], "captions are made from the shards"
        assert plan_job(config).tasks == []
    rows = [row for row in rows_of(output) if row["status"] == "ok"]
    tries = [row["second_tries"] for row in rows]
    assert len(rows) == 8 and 0 < sum(tries) < 8, "the test needs both"
    for row in rows:
        assert (row["caption"], row["face_caption"]) == (CAPTION, FACE)
        assert (row["answer_finish"], row["mended_answers"]) == (["stop", "stop"], 1)
        assert row["answer_verdicts"] == ["preamble", ""]
        assert row["first_verdicts"] == ["", "refusal" if row["second_tries"] else ""]

    metrics = write_report(str(output)).stats["data"]["metrics"]
    assert metrics["mended_answers"]["mean"] == 1
    assert metrics["second_tries"]["mean"] == sum(tries) / 8
    page = (output / layout.REPORT).read_text()
    assert 'data-of="second_tries"' in page and "Mended answers" in page

    console = Console(record=True, width=120, file=io.StringIO())
    key = rows[tries.index(1)]["key"]
    show(inspect(DatasetReader(str(output)).store, key), console, image=False)
    lines = console.export_text()
    assert "second tries" in lines and "first verdicts" in lines and "refusal" in lines
