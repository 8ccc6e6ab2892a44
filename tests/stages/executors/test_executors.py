"""The inline executor with data sets: equal bytes after a kill, and captions from a server."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.errors import ServerError
from pipelines.cli import app
from pipelines.ledger import read_ledger
from pipelines.lint import lint
from pipelines.run import execute, plan_job
from stages.storage.store import Store
from tests.pipelines.helpers import digests
from tests.stages.chat_server import ChatServer, Reply, Request, completion, refusal
from tests.stages.executors.captioned import KEY, captioned, mentions_key, settings
from tests.stages.executors.stopped import arguments, stopped


@pytest.mark.slow
def test_a_killed_and_resumed_run_writes_the_bytes_of_an_uninterrupted_one(
    portraits: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    command = arguments(portraits, tmp_path, "inline")
    code, _ = stopped(command, tmp_path, signal.SIGKILL)
    assert code == -signal.SIGKILL, "the run ended before it could be killed"
    assert CliRunner().invoke(app, command).exit_code == 0
    assert digests(tmp_path) == expected
    assert list(lint(Store(str(tmp_path)))) == []
    assert not [path.name for path in (tmp_path / "shards").iterdir() if ".tmp-" in path.name]


def test_a_refused_caption_fails_alone_and_no_file_contains_the_key(
    four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    images: list[bytes] = []

    def decide(request: Request) -> Reply:
        if request.is_plain:
            return completion(request)
        images.append(request.jpeg)
        refused = request.jpeg == images[0] and "facial features" in request.prompt
        return refusal(400, f"not for {KEY}") if refused else completion(request)

    with ChatServer(decide) as server:
        job = plan_job(settings(four, tmp_path, server, "inline"), chain=captioned)
        list(execute(job, lambda count: None))
    ledger = read_ledger(Store(str(tmp_path)))
    assert (ledger.written, dict(ledger.failed)) == (3, {"caption_failed": 1})
    assert not mentions_key(tmp_path)


def test_a_server_that_refuses_the_key_ends_the_run(four: Path, tmp_path: Path) -> None:
    reply = refusal(401, "no")
    with ChatServer(lambda request: reply) as server:
        job = plan_job(settings(four, tmp_path, server, "inline"), chain=captioned)
        with pytest.raises(ServerError, match="refuses the key"):
            list(execute(job, lambda count: None))
    assert read_ledger(job.store).inputs == 0, "nothing is committed"
