"""Captions from a server, through both executors: bytes, counts, secrets, and a server that isn't
there.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.chains import resizing
from configs.errors import ServerError
from configs.schema import DatasetConfig
from pipelines.ledger import read_ledger
from pipelines.run import execute, plan_job
from stages.backends.weights import Weights
from stages.base import Stage
from stages.caption import CaptionStage
from stages.storage.store import Store
from tests.pipelines.helpers import NO_COPIES, config, digests
from tests.stages.chat_server import ChatServer, Reply, Request, completion, refusal

KEY = "sk-test-c0ffee0ddba11"


def captioned(config: DatasetConfig) -> list[Stage]:
    """A Chain: resize, constants for the models between, captions."""
    return [*resizing(config), CaptionStage(config.caption, Weights())]


def settings(source: Path, output: Path, server: ChatServer, executor: str) -> DatasetConfig:
    caption = [
        f"caption.openai.base_url={server.base_url}",
        "caption.openai.model=someone/model",
        "caption.openai.tries=1",
    ]
    return config(
        source, output, "caption.backend=openai", *NO_COPIES, *caption, f"executor={executor}"
    )


@pytest.mark.slow
def test_executors_write_the_same_and_the_manifests_count_tokens(
    portraits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    pictures: list[bytes] = []

    def decide(asked: Request) -> Reply:
        pictures.append(asked.jpeg)
        refused = asked.jpeg == pictures[0] and "facial features" in asked.prompt
        return refusal(400, f"not for {KEY}") if refused else completion(asked)

    written: dict[str, dict[str, str]] = {}
    for executor in ("inline", "ray"):
        with ChatServer() as server:
            job = plan_job(
                settings(portraits, tmp_path / executor, server, executor), chain=captioned
            )
            done = list(execute(job, lambda count: None))
        counts = [manifest.run.stage_counts for manifest in done]
        assert (
            counts
            == [{"caption": {"prompt_tokens": 4 * 2 * 7, "completion_tokens": 4 * 2 * 3}}] * 2
        )
        assert {asked.key for asked in server.asked} == {KEY}
        written[executor] = digests(tmp_path / executor)
        kept = [path.read_bytes() for path in (tmp_path / executor).rglob("*") if path.is_file()]
        assert len(kept) > 6 and not any(KEY.encode() in data for data in kept)
    assert written["inline"] == written["ray"]
    with ChatServer(decide) as server:
        job = plan_job(settings(portraits, tmp_path / "refused", server, "inline"), chain=captioned)
        list(execute(job, lambda count: None))
    ledger = read_ledger(Store(str(tmp_path / "refused")))
    assert (ledger.written, dict(ledger.failed)) == (7, {"caption_failed": 1})
    kept = [path.read_bytes() for path in (tmp_path / "refused").rglob("*") if path.is_file()]
    assert not any(KEY.encode() in data for data in kept)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["inline", "ray"])
def test_a_server_that_refuses_ends_the_run_with_one_clear_line(
    executor: str, portraits: Path, tmp_path: Path
) -> None:
    reply = refusal(401, "no")
    with ChatServer(lambda asked: reply) as server:
        job = plan_job(settings(portraits, tmp_path, server, executor), chain=captioned)
        with pytest.raises(ServerError, match="refuses the key"):
            list(execute(job, lambda count: None))
    assert read_ledger(job.store).inputs == 0, "nothing is committed"
