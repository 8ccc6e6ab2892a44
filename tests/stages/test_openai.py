"""The `openai` backend with a server that records requests."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from skimage.data import astronaut, cat, coffee, rocket

from configs.captions import CaptionConfig, LlavaConfig, OpenAIConfig
from configs.common import PlacementConfig
from configs.errors import ConfigError, ServerError
from stages.backends.openai import OpenAICaptioner
from stages.backends.weights import Weights
from stages.base import Failed
from stages.caption import CaptionStage
from stages.codec import encode_jpeg
from stages.record import Record
from tests.stages.chat_server import (
    USAGE,
    ChatServer,
    Reply,
    Request,
    caption_of,
    completion,
    refusal,
)
from tests.stages.records import drawn_record, texts_of
from tests.stages.transformers_server import free_port

TOKENS = 24
KEY = "sk-test-5b2d0c9e77"


def config_of(base_url: str, model: Path | str = "someone/model", **changes: Any) -> OpenAIConfig:
    settings: dict[str, Any] = {"max_new_tokens": TOKENS, "tries": 2, "timeout": 20.0}
    settings |= {"pad_to_square": False, **changes}  # tests/stages/test_views.py has padded ones
    settings.setdefault("face_max_new_tokens", settings["max_new_tokens"])
    return OpenAIConfig(base_url=base_url, model=str(model), **settings)


def stage_of(config: OpenAIConfig, **changes: Any) -> CaptionStage:
    return CaptionStage(CaptionConfig(backend="openai", openai=config, **changes), Weights())


@pytest.fixture(scope="module")
def records() -> list[Record]:
    images = (astronaut(), cat()[:, :150], coffee()[:300], rocket())
    return [
        Record(key=f"{n:020x}", source=str(n), image=encode_jpeg(image, 95))
        for n, image in enumerate(images)
    ]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of each pause of the openai package, which are fifty times shorter."""
    seconds: list[float] = []
    sleep = anyio.sleep

    async def shorter(delay: float) -> None:
        seconds.append(delay)
        await sleep(delay / 50)

    monkeypatch.setattr(anyio, "sleep", shorter)
    return seconds


def test_a_request_asks_for_greedy_decoding_and_has_the_jpeg_unchanged_before_the_prompt(
    records: list[Record],
) -> None:
    with ChatServer() as server:
        config = config_of(server.base_url)
        captioner = OpenAICaptioner(config)
        texts = texts_of(captioner.caption(records))
    prompts = (config.prompt, config.face_prompt)
    assert texts == [tuple(caption_of(r.image, prompt) for prompt in prompts) for r in records]
    assert {(request.jpeg, request.prompt) for request in server.requests} == {
        (r.image, prompt) for r in records for prompt in prompts
    }
    for request in server.requests:
        settings = {"model": "someone/model", "temperature": 0, "max_tokens": TOKENS}
        assert request.body | settings == request.body and request.key == KEY
    assert captioner.counts == {
        name: 2 * len(records) * USAGE[name] for name in ("prompt_tokens", "completion_tokens")
    }


def test_concurrency_limits_the_open_requests(records: list[Record]) -> None:
    for limit, seconds in ((1, 0.02), (3, 0.1)):
        with ChatServer(partial(completion, seconds=seconds)) as server:
            OpenAICaptioner(config_of(server.base_url, concurrency=limit)).caption(records)
        assert server.most_open == limit and len(server.requests) == 2 * len(records)


def test_a_call_takes_several_times_as_many_records_as_requests_may_be_open() -> None:
    for concurrency, size, window in ((1, 1, 8), (16, 1, 128), (16, 256, 256)):
        stage = stage_of(
            config_of("http://127.0.0.1:9", concurrency=concurrency),
            placement=PlacementConfig(batch_size=size),
        )
        assert stage.batch_size == window


def test_temporary_failures_are_retried_after_retry_after(
    records: list[Record], pauses: list[float]
) -> None:
    def decide(request: Request) -> Reply:
        first = [refusal(429, "too many", **{"Retry-After": "1"}), refusal(500, "overloaded")]
        return first[request.number] if request.number < len(first) else completion(request)

    with ChatServer(decide) as server:
        config = config_of(server.base_url, tries=3, concurrency=1)
        texts = texts_of(OpenAICaptioner(config).caption(records[:1]))
    assert texts == [
        (
            caption_of(records[0].image, config.prompt),
            caption_of(records[0].image, config.face_prompt),
        )
    ]
    assert len(server.requests) == 4, "three for the first prompt, one for the second"
    requested, own = pauses
    assert requested == 1, "without Retry-After, the first pause is at most 0.5 s"
    assert own > 0.3


def test_pauses_grow_without_retry_after(records: list[Record], pauses: list[float]) -> None:
    def decide(request: Request) -> Reply:
        return refusal(503, "loading") if request.number < 3 else completion(request)

    with ChatServer(decide) as server:
        OpenAICaptioner(config_of(server.base_url, tries=4, concurrency=1)).caption(records[:1])
    first, second, third = pauses
    assert 0.3 < first < second < third


NOT_COMPLETIONS = {
    "HTML": Reply(200, b"<html>welcome</html>", {"Content-Type": "text/html"}),
    "no JSON": Reply(200, b'{"choices": ['),
    "other JSON": Reply(200, b'{"choices": []}'),
    "a list": Reply(200, b"[1, 2]"),
    "no text": Reply(200, b'{"choices": [{"message": {"content": [1]}}]}'),
}
RECORDS_FAULT: dict[str, tuple[Reply, str]] = {
    "refused": (
        refusal(400, f"bad image, {KEY}"),
        "status 400: .*bad image, …",
    ),
    "error": (refusal(500, "CUDA error"), "status 500: .*CUDA error"),
    "too slow": (Reply(seconds=5), "APITimeoutError"),
    **{
        name: (reply, "the answer is no chat completion") for name, reply in NOT_COMPLETIONS.items()
    },
}


def reply_to(image: bytes, reply: Reply) -> Callable[[Request], Reply]:
    """Returns a `decide` with this reply for one image, and completions for others."""
    return lambda request: reply if request.jpeg == image else completion(request)


@pytest.mark.parametrize("name", RECORDS_FAULT)
def test_a_record_whose_requests_fail_fails_alone(name: str, records: list[Record]) -> None:
    reply, expected = RECORDS_FAULT[name]
    bad = records[1]
    timeout = 1.0 if name == "too slow" else 20.0
    with ChatServer(reply_to(bad.image, reply)) as server:
        config = config_of(server.base_url, timeout=timeout)
        texts = texts_of(OpenAICaptioner(config).caption(records))
    failed = texts[1]
    assert isinstance(failed, Failed) and failed.reason == "caption_failed"
    assert re.search(expected, failed.detail), failed.detail
    assert KEY not in failed.detail
    others = [record for record in records if record is not bad]
    assert [t for t in texts if t is not failed] == [
        (caption_of(r.image, config.prompt), caption_of(r.image, config.face_prompt))
        for r in others
    ]


def test_the_stage_records_reason_and_detail_of_a_failed_record() -> None:
    good, bad = drawn_record("good.jpg"), drawn_record("bad.jpg")
    bad = replace(bad, image=encode_jpeg(np.zeros((512, 512, 3), np.uint8), 95))
    with ChatServer(reply_to(bad.image, refusal(400, "no"))) as server:
        stage = stage_of(config_of(server.base_url))
        stage.setup()
        results = stage.process([good, bad])
    assert [(r.ok, r.reason, r.stage) for r in results] == [
        (True, "", ""),
        (False, "caption_failed", "caption"),
    ]
    assert "status 400" in results[1].detail
    # two requests of the good record, and two with the test image
    assert stage.take_counts() == {"prompt_tokens": 4 * 7, "completion_tokens": 4 * 3}
    assert stage.take_counts() == {}


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
    "overloaded": (
        refusal(429, "quota", **{"Retry-After": "0.1"}),
        r"Lower caption\.openai\.concurrency=8",
    ),
    "error": (refusal(500, f"CUDA error {KEY}"), "status 500: .*CUDA error …"),
    "hangs": (Reply(seconds=3), "APITimeoutError: .*is it running"),
    **{
        name: (reply, "no chat completion.*Expected OpenAI's chat completions")
        for name, reply in NOT_COMPLETIONS.items()
    },
}


@pytest.mark.parametrize("name", SERVERS_FAULT)
def test_a_fault_of_the_server_or_the_configuration_ends_the_run(
    name: str, records: list[Record]
) -> None:
    reply, expected = SERVERS_FAULT[name]
    timeout = 0.2 if name == "hangs" else 20.0
    with (
        ChatServer(lambda request: reply) as server,
        pytest.raises(ServerError, match=expected) as caught,
    ):
        OpenAICaptioner(config_of(server.base_url, timeout=timeout)).caption(records)
    printed = "".join(traceback.format_exception(caught.value))
    assert KEY not in printed and KEY[-6:] not in printed
    assert server.base_url in printed and "the same command continues" in printed


def test_a_missing_server_ends_the_run_with_its_url(records: list[Record]) -> None:
    base_url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(ServerError, match=rf"{base_url}.*APIConnectionError.*is it running"):
        OpenAICaptioner(config_of(base_url)).caption(records)


def test_a_server_that_stops_during_a_run_ends_the_run(records: list[Record]) -> None:
    with ChatServer() as server:
        captioner = OpenAICaptioner(config_of(server.base_url))
        assert len(captioner.caption(records)) == len(records)
    with pytest.raises(ServerError, match="is it running"):
        captioner.caption(records)


def test_requests_without_a_key_and_the_error_if_the_server_needs_one(
    records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with ChatServer() as server:
        OpenAICaptioner(config_of(server.base_url)).caption(records[:1])
    assert {request.key for request in server.requests} == {"none"}
    reply = refusal(401, "a key is required")
    with (
        ChatServer(lambda request: reply) as server,
        pytest.raises(ServerError, match="OPENAI_API_KEY is empty"),
    ):
        OpenAICaptioner(config_of(server.base_url)).caption(records[:1])


def test_the_key_is_read_from_the_configured_environment_variable(
    records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPTION_KEY", "another")
    with ChatServer() as server:
        OpenAICaptioner(config_of(server.base_url, api_key_env="CAPTION_KEY")).caption(records[:1])
    assert {request.key for request in server.requests} == {"another"}


def test_a_missing_setting_is_an_error_before_the_run_starts() -> None:
    with pytest.raises(ConfigError, match=r"caption\.openai\.base_url is empty"):
        stage_of(config_of("")).signature()
    with pytest.raises(ConfigError, match=r"caption\.openai\.model is empty"):
        stage_of(config_of("http://127.0.0.1:9/v1", "")).signature()


def test_the_signature_depends_on_settings_that_change_captions_only() -> None:
    def signature(**changes: Any) -> str:
        return stage_of(replace(config, **changes)).signature()

    config = config_of("http://127.0.0.1:9/v1", "a", root="a")

    connection = {
        "base_url": "http://elsewhere/v1,http://127.0.0.1:9/v1",
        "api_key_env": "X",
        "concurrency": 1,
        "tries": 9,
        "timeout": 1.0,
    }
    for name, value in connection.items():
        assert signature(**{name: value}) == signature(), name
    other_settings: dict[str, Any] = {
        "placement": PlacementConfig(cpus=2),
        "llava": LlavaConfig(model="c", prompt="Who?", dtype="float16", device="cuda:1"),
    }
    for name, value in other_settings.items():
        assert stage_of(config, **{name: value}).signature() == signature(), name
    for name, value in {
        "model": "b",
        "prompt": "Who?",
        "face_prompt": "Who?",
        "max_new_tokens": 9,
    }.items():
        assert signature(**{name: value}) != signature(), name


def test_each_caption_has_its_own_limit_of_tokens(records: list[Record]) -> None:
    with ChatServer() as server:
        config = config_of(server.base_url, max_new_tokens=5, face_max_new_tokens=9)
        captioner = OpenAICaptioner(config)
        captioner.caption(records[:2])
        captioner.retry(records[:2], [1, 0])
    limits = {(r.prompt, r.body["max_tokens"]) for r in server.requests}
    assert limits == {
        (config.prompt, 5),
        (config.face_prompt, 9),
        (config.retry_prompt, 5),
        (config.face_retry_prompt, 9),
    }
