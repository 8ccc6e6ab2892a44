"""A run with a caption server: it stops early where the server doesn't fit, and commands that don't
caption need no server.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pipelines.cli import app
from stages.backends.openai.preflight import stated_root
from stages.storage import layout
from tests.pipelines.helpers import rows_of
from tests.stages.chat_server import ChatServer, completion, within

ROOT = "/models/a"
CAPTION = "A person with curly hair looks at the camera, and the eyes, nose and mouth are visible."


def command(*args: Any) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def run(output: Path, *overrides: str) -> Result:
    """Runs the pipeline with the data set's own configuration and changed settings."""
    return command("run", "--config", output / layout.CONFIG, f"output={output}", *overrides)


def openai(url: str, **changes: Any) -> tuple[str, ...]:
    settings = {"base_url": url, "model": "m", "tries": 1} | changes
    return (
        "caption.backend=openai",
        *(f"caption.openai.{name}={value}" for name, value in settings.items()),
    )


def files(output: Path) -> dict[str, bytes]:
    """Returns all files but the lock."""
    paths = [p for p in output.rglob("*") if p.is_file() and p.name != layout.LOCK]
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


def listed(root: str, context: int) -> list[dict[str, Any]]:
    return [{"id": "m", "root": root, "max_model_len": context}]


def test_a_server_that_does_not_fit_stops_a_run_before_it_changes_anything(
    data: Path, tmp_path: Path
) -> None:
    """512² pixels would fit: the limit is that of the largest picture that the settings allow."""
    output = Path(shutil.copytree(data, tmp_path / "out"))
    before = files(output)
    with ChatServer(within(5400), models=listed(ROOT, 5400)) as server:
        result = run(output, *openai(server.base_url))
        assert result.exit_code == 2
        assert "5,529 in all" in result.output and "5,400 (max_model_len)" in result.output
        assert files(output) == before
        assert len(server.requests) == 4
        assert all(request.is_plain for request in server.requests)


def test_commands_that_do_not_caption_need_no_server(data: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(data, tmp_path / "out"))
    with ChatServer(lambda request: completion(request, text=CAPTION), listed(ROOT, 0)) as server:
        settings = openai(server.base_url)
        assert run(output, *settings).exit_code == 0
        captioned = len(server.requests)
        assert "nothing to do" in run(output, *settings).output
        assert run(output, *settings, "claims.min_agreement=0.1").exit_code == 0
        assert len(server.requests) == captioned

    stated_root.cache_clear()  # as in another process
    row = next(row for row in rows_of(output) if row["status"] == "ok")
    for args in (
        ("status", output),
        ("info", output),
        ("lint", output),
        ("report", output),
        ("inspect", output, row["key"], "--no-image"),
        ("takedown", output, "--source", row["source"], "--yes", "--page", tmp_path / "page.html"),
    ):
        result = command(*args)
        assert result.exit_code == 0, (args[0], result.output)
    assert row["key"] not in [row["key"] for row in rows_of(output) if row["status"] == "ok"]

    gone = run(output, *settings, "--dry-run")
    assert gone.exit_code == 2 and "caption.openai.root" in gone.output
    pinned = run(output, *settings, f"caption.openai.root={ROOT}", "claims.min_agreement=0.1")
    assert pinned.exit_code == 0 and "no shard" in pinned.output
    stale = run(output, *settings, "caption.openai.root=/models/b", "--dry-run")
    assert "through caption, claims, review, from their own samples" in stale.output


@pytest.mark.parametrize("reachable", [False, True])
def test_a_retry_asks_the_server_first(data: Path, tmp_path: Path, reachable: bool) -> None:
    output = Path(shutil.copytree(data, tmp_path / "out"))
    fails = True

    def decide(request: Any) -> Any:
        plain = request.is_plain or not fails
        return completion(request, text=CAPTION if plain else "!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!")

    with ChatServer(decide) as server:
        settings = openai(server.base_url)
        run(output, *settings)
        fails = False
        if reachable:
            result = command("retry", output, "--reason", "caption_loop", *settings)
            assert result.exit_code == 0, result.output
            assert all(row["reason"] != "caption_loop" for row in rows_of(output))
    if not reachable:
        result = command("retry", output, "--reason", "caption_loop", *settings)
        assert result.exit_code == 2 and "is it running" in result.output
