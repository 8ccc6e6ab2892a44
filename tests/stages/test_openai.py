"""The `openai` backend against real servers: one of transformers' own, and one that says what it
was asked.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage.data import astronaut, cat, coffee, rocket

from configs.captions import CaptionConfig, LlavaConfig, OpenAIConfig
from configs.common import PlacementConfig
from configs.errors import ConfigError, ServerError
from stages.backends.llava import Llava
from stages.backends.openai import OpenAICaptioner
from stages.backends.weights import Weights
from stages.base import Failed
from stages.caption import CaptionStage
from stages.codec import encode_jpeg
from stages.record import Record
from tests.stages.chat_server import USAGE, Asked, ChatServer, Reply, completion, refusal, words
from tests.stages.drawing import record_of
from tests.stages.tiny_llava import make_checkpoint

TOKENS = 24
KEY = "sk-test-5b2d0c9e77"


def config_of(base_url: str, model: Path | str = "someone/model", **changes: Any) -> OpenAIConfig:
    given: dict[str, Any] = {"max_new_tokens": TOKENS, "tries": 2, "timeout": 20.0, **changes}
    return OpenAIConfig(base_url=base_url, model=str(model), **given)


def stage_of(config: OpenAIConfig, **changes: Any) -> CaptionStage:
    return CaptionStage(CaptionConfig(backend="openai", openai=config, **changes), Weights())


@pytest.fixture(scope="module")
def records() -> list[Record]:
    pictures = (astronaut(), cat()[:, :150], coffee()[:300], rocket())
    return [
        Record(key=f"{n:020x}", source=str(n), image=encode_jpeg(p, 95))
        for n, p in enumerate(pictures)
    ]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


# ------------------------------------------------------------------------------------------- transf


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With habits of its own in sampling, which greedy decoding has to override on both ways."""
    torch.set_num_threads(1)
    folder = make_checkpoint(tmp_path_factory.mktemp("llava"))
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 2.0, "repetition_penalty": 1.5}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def served(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`transformers serve` with that checkpoint, as a process of its own; its base URL."""
    port = free_port()
    program = Path(sys.executable).with_name("transformers")
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as stream:
        command = [str(program), "serve", str(checkpoint), *options]
        server = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
    try:
        until = time.monotonic() + 400  # it imports for seconds, on a busy machine for minutes
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(timeout=30)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.mark.slow
def test_a_server_and_the_model_in_this_process_give_the_same_captions(
    served: str, checkpoint: Path, records: list[Record]
) -> None:
    here = Llava(LlavaConfig(model=str(checkpoint), device="cpu", max_new_tokens=TOKENS)).caption(
        records, batch_size=4
    )
    assert len({text for pair in here for text in pair}) == 2 * len(records), (
        "all must differ, or this is void"
    )
    captioner = OpenAICaptioner(config_of(served, checkpoint, concurrency=3))
    assert captioner.caption(records) == here
    assert captioner.caption(records[::-1]) == here[::-1], (
        "from call to call, on connections that are open"
    )
    assert captioner.counts["completion_tokens"] == 2 * 2 * len(records) * TOKENS, (
        "no answer ends before its time"
    )
    assert captioner.counts["prompt_tokens"] > 2 * 2 * len(records) * 16, (
        "pictures count as 16 tokens each"
    )


@pytest.mark.slow
def test_a_model_that_the_server_does_not_have_ends_the_run(
    served: str, records: list[Record]
) -> None:
    with pytest.raises(
        ServerError, match=r"caption\.openai\.model=someone/other: .*status 400.*someone/other"
    ):
        OpenAICaptioner(config_of(served, "someone/other")).caption(records[:1])


# ---------------------------------------------------------------------------------------- what goes


def test_a_request_is_greedy_and_holds_the_jpeg_as_it_is_before_the_prompt(
    records: list[Record],
) -> None:
    with ChatServer() as server:
        config = config_of(server.base_url)
        captioner = OpenAICaptioner(config)
        texts = captioner.caption(records)
    prompts = (config.prompt, config.face_prompt)
    assert texts == [tuple(words(r.image, prompt) for prompt in prompts) for r in records]
    assert {(a.jpeg, a.prompt) for a in server.asked} == {
        (r.image, prompt) for r in records for prompt in prompts
    }
    for asked in server.asked:
        wanted = {"model": "someone/model", "temperature": 0, "max_tokens": TOKENS}
        assert asked.body | wanted == asked.body and asked.key == KEY
    assert captioner.counts == {
        name: 2 * len(records) * USAGE[name] for name in ("prompt_tokens", "completion_tokens")
    }


def test_no_more_requests_are_open_than_asked_for(records: list[Record]) -> None:
    for limit in (1, 3):
        with ChatServer(lambda asked: completion(asked, seconds=0.1)) as server:
            OpenAICaptioner(config_of(server.base_url, concurrency=limit)).caption(records)
        assert server.most == limit and len(server.asked) == 2 * len(records)


def test_a_call_takes_enough_pictures_to_keep_the_requests_open() -> None:
    for concurrency, size, window in ((1, 1, 1), (16, 1, 16), (16, 64, 64)):
        stage = stage_of(
            config_of("http://127.0.0.1:9", concurrency=concurrency),
            placement=PlacementConfig(batch_size=size),
        )
        assert stage.batch_size == window


# --------------------------------------------------------------------------------------------------


def test_what_may_pass_is_tried_again_when_the_server_says(records: list[Record]) -> None:
    arrived: list[float] = []

    def decide(asked: Asked) -> Reply:
        arrived.append(time.monotonic())
        first = [refusal(429, "too many", **{"Retry-After": "1"}), refusal(500, "out of breath")]
        return first[asked.number] if asked.number < len(first) else completion(asked)

    with ChatServer(decide) as server:
        config = config_of(server.base_url, tries=3, concurrency=1)
        texts = OpenAICaptioner(config).caption(records[:1])
    assert texts == [
        (words(records[0].image, config.prompt), words(records[0].image, config.face_prompt))
    ]
    assert len(arrived) == 4, "three for the first prompt, one for the second"
    assert arrived[1] - arrived[0] >= 1, (
        "Retry-After; a first pause of the package's own is half of that at most"
    )
    assert arrived[2] - arrived[1] > 0.3


def test_pauses_grow_where_the_server_says_nothing(records: list[Record]) -> None:
    arrived: list[float] = []

    def decide(asked: Asked) -> Reply:
        arrived.append(time.monotonic())
        return refusal(503, "loading") if asked.number < 3 else completion(asked)

    with ChatServer(decide) as server:
        OpenAICaptioner(config_of(server.base_url, tries=4, concurrency=1)).caption(records[:1])
    first, second, third = np.diff(arrived[:4])
    assert 0.3 < first < second < third


# ------------------------------------------------------------------------------------------------ a

GARBAGE = {
    "a page": Reply(200, b"<html>welcome</html>", {"Content-Type": "text/html"}),
    "no JSON": Reply(200, b'{"choices": ['),
    "other JSON": Reply(200, b'{"choices": []}'),
    "a list": Reply(200, b"[1, 2]"),
    "no text": Reply(200, b'{"choices": [{"message": {"content": [1]}}]}'),
}
RECORDS_FAULT: dict[str, tuple[Reply, str]] = {
    "refused": (
        refusal(400, f"the picture is no good, {KEY}"),
        "status 400: .*the picture is no good, …",
    ),
    "breaks it": (refusal(500, "CUDA error"), "status 500: .*CUDA error"),
    "too slow": (Reply(seconds=5), "APITimeoutError"),
    **{name: (reply, "the answer is no chat completion") for name, reply in GARBAGE.items()},
}


def only(image: bytes, reply: Reply) -> Callable[[Asked], Reply]:
    return lambda asked: reply if asked.jpeg == image else completion(asked)


@pytest.mark.parametrize("name", RECORDS_FAULT)
def test_a_picture_that_gets_no_answer_fails_alone(name: str, records: list[Record]) -> None:
    reply, expected = RECORDS_FAULT[name]
    bad = records[1]
    with ChatServer(only(bad.image, reply)) as server:
        config = config_of(server.base_url, timeout=2.0)
        texts = OpenAICaptioner(config).caption(records)
    failed = texts[1]
    assert isinstance(failed, Failed) and failed.reason == "caption_failed"
    assert re.search(expected, failed.detail), failed.detail
    assert KEY not in failed.detail
    others = [record for record in records if record is not bad]
    assert [t for t in texts if t is not failed] == [
        (words(r.image, config.prompt), words(r.image, config.face_prompt)) for r in others
    ]


def test_the_stage_records_the_reason_and_goes_on() -> None:
    good, bad = record_of("good.jpg"), record_of("bad.jpg")
    bad = replace(bad, image=encode_jpeg(np.zeros((512, 512, 3), np.uint8), 95))
    with ChatServer(only(bad.image, refusal(400, "no"))) as server:
        stage = stage_of(config_of(server.base_url))
        stage.setup()
        answers = stage.process([good, bad])
    assert [(a.ok, a.reason, a.stage) for a in answers] == [
        (True, "", ""),
        (False, "caption_failed", "caption"),
    ]
    assert "status 400" in answers[1].detail
    # and one of our own
    assert stage.take_counts() == {"prompt_tokens": 3 * 7 + 7, "completion_tokens": 3 * 3 + 3}
    assert stage.take_counts() == {}


# ---------------------------------------------------------------------------------------------- the

SERVERS_FAULT: dict[str, tuple[Reply, str]] = {
    "wrong key": (
        refusal(401, f"Incorrect API key provided: {KEY}"),
        r"refuses the key \(status 401\).*OPENAI_API_KEY",
    ),
    "forbidden": (refusal(403, f"{KEY} may not"), r"refuses the key \(status 403\)"),
    "no such model": (
        refusal(404, "The model `someone/model` does not exist"),
        "status 404: .*does not exist",
    ),
    "too busy": (
        refusal(429, "quota", **{"Retry-After": "0.1"}),
        r"Lower caption\.openai\.concurrency=8",
    ),
    "broken": (refusal(500, f"CUDA error {KEY}"), "status 500: .*CUDA error …"),
    "hangs": (Reply(seconds=3), "APITimeoutError: .*is it running"),
    **{
        name: (reply, "no chat completion.*Expected OpenAI's chat completions")
        for name, reply in GARBAGE.items()
    },
}


@pytest.mark.parametrize("name", SERVERS_FAULT)
def test_what_is_no_pictures_fault_ends_the_run(name: str, records: list[Record]) -> None:
    reply, expected = SERVERS_FAULT[name]
    with (
        ChatServer(lambda asked: reply) as server,
        pytest.raises(ServerError, match=expected) as caught,
    ):
        OpenAICaptioner(config_of(server.base_url, timeout=0.5)).caption(records)
    said = "".join(traceback.format_exception(caught.value))
    assert KEY not in said and KEY[-6:] not in said
    assert server.base_url in said and "the same command goes on" in said


def test_nobody_there_ends_the_run_and_says_where(records: list[Record]) -> None:
    base_url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(ServerError, match=rf"{base_url}.*APIConnectionError.*is it running"):
        OpenAICaptioner(config_of(base_url)).caption(records)


def test_a_server_that_goes_away_in_between_ends_the_run(records: list[Record]) -> None:
    with ChatServer() as server:
        captioner = OpenAICaptioner(config_of(server.base_url))
        assert len(captioner.caption(records)) == len(records)
    with pytest.raises(ServerError, match="is it running"):
        captioner.caption(records)


# --------------------------------------------------------------------------------------------------


def test_a_server_without_keys_is_asked_without_one(
    records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with ChatServer() as server:
        OpenAICaptioner(config_of(server.base_url)).caption(records[:1])
    assert {asked.key for asked in server.asked} == {"none"}
    reply = refusal(401, "who are you?")
    with (
        ChatServer(lambda asked: reply) as server,
        pytest.raises(ServerError, match="OPENAI_API_KEY is empty"),
    ):
        OpenAICaptioner(config_of(server.base_url)).caption(records[:1])


def test_the_key_is_taken_from_the_variable_that_is_named(
    records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPTION_KEY", "another")
    with ChatServer() as server:
        OpenAICaptioner(config_of(server.base_url, api_key_env="CAPTION_KEY")).caption(records[:1])
    assert {asked.key for asked in server.asked} == {"another"}


def test_what_is_missing_is_said_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"caption\.openai\.base_url is empty"):
        stage_of(config_of("")).signature()
    with pytest.raises(ConfigError, match=r"caption\.openai\.model is empty"):
        stage_of(config_of("http://127.0.0.1:9/v1", "")).signature()


def test_the_signature_follows_what_changes_answers_not_how_they_are_fetched() -> None:
    def signature(**changes: Any) -> str:
        return stage_of(replace(config_of("http://127.0.0.1:9/v1"), **changes)).signature()

    fetched = {
        "base_url": "http://elsewhere/v1",
        "api_key_env": "X",
        "concurrency": 1,
        "tries": 9,
        "timeout": 1.0,
    }
    for name, value in fetched.items():
        assert signature(**{name: value}) == signature(), name
    own = config_of("http://127.0.0.1:9/v1")
    others: dict[str, Any] = {
        "placement": PlacementConfig(cpus=2),
        "llava": LlavaConfig(model="c", prompt="Who?", dtype="float16", device="cuda:1"),
    }
    for name, value in others.items():
        assert stage_of(own, **{name: value}).signature() == signature(), name
    for name, value in {
        "model": "b",
        "prompt": "Who?",
        "face_prompt": "Who?",
        "max_new_tokens": 9,
    }.items():
        assert signature(**{name: value}) != signature(), name
