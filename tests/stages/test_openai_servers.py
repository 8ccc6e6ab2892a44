"""The `openai` backend with several servers: who is asked, who is left out, and who comes back."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from configs.captions import OpenAIConfig
from configs.errors import ServerError
from stages.backends.openai import OpenAICaptioner
from stages.base import Failed
from stages.record import Record
from tests.stages.chat_server import ChatServer, Reply, Request, caption_of, completion, refusal
from tests.stages.records import drawn_record, texts_of
from tests.stages.transformers_server import free_port

OVERLOADED = refusal(503, "overloaded")


def config_of(*urls: str, **changes: Any) -> OpenAIConfig:
    settings: dict[str, Any] = {"model": "m", "tries": 1, "timeout": 20.0, **changes}
    return OpenAIConfig(base_url=",".join(urls), **settings)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    one = drawn_record("one")
    return [replace(one, key=f"{n:020x}") for n in range(12)]


@pytest.fixture
def start() -> Iterator[Callable[..., ChatServer]]:
    """Starts servers, which end with the test."""
    with ExitStack() as stack:
        yield lambda *args, **settings: stack.enter_context(ChatServer(*args, **settings))


def texts(captioner: OpenAICaptioner, records: list[Record]) -> None:
    """Captions the records, and compares the answers with those that any server gives."""
    config = captioner.config
    assert texts_of(captioner.caption(records)) == [
        tuple(caption_of(r.image, prompt) for prompt in (config.prompt, config.face_prompt))
        for r in records
    ]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_requests_are_shared_and_concurrency_limits_those_to_all_servers(
    records: list[Record], start: Callable[..., ChatServer]
) -> None:
    slow = partial(completion, seconds=0.05)
    one, two = start(slow), start(slow)
    texts(OpenAICaptioner(config_of(one.base_url, two.base_url, concurrency=4)), records)
    assert len(one.requests) + len(two.requests) == 24
    assert one.most_open == two.most_open == 2


def test_a_server_that_is_given_twice_gets_two_shares(
    records: list[Record], start: Callable[..., ChatServer]
) -> None:
    slow = partial(completion, seconds=0.05)
    one, two = start(slow), start(slow)
    urls = (one.base_url, f"{one.base_url}/", two.base_url)
    texts(OpenAICaptioner(config_of(*urls, concurrency=6)), records)
    assert (one.most_open, two.most_open) == (4, 2)
    assert 14 <= len(one.requests) <= 18


@pytest.mark.parametrize("fault", ["gone", "overloaded", "hangs"])
def test_requests_of_a_failing_server_go_to_another_one_at_once(
    fault: str,
    records: list[Record],
    start: Callable[..., ChatServer],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "openai")
    good = start()
    replies = {"overloaded": OVERLOADED, "hangs": Reply(seconds=3)}
    url = f"http://127.0.0.1:{free_port()}/v1"
    if fault in replies:
        url = start(lambda request: replies[fault]).base_url
    timeout = 0.5 if fault == "hangs" else 20.0
    config = config_of(url, good.base_url, tries=4, timeout=timeout, concurrency=2)
    captioner = OpenAICaptioner(config)
    texts(captioner, records)
    assert "Retrying request" not in caplog.text, "the openai package would pause before that"
    assert f"caption server {url} is left out: " in caplog.text
    assert good.base_url not in caplog.text
    assert len(good.requests) == 24


def test_a_server_comes_back_when_it_answers(
    records: list[Record], start: Callable[..., ChatServer], caplog: pytest.LogCaptureFixture
) -> None:
    slow = partial(completion, seconds=0.03)
    first = start(slow)
    with ExitStack() as stack:
        second = stack.enter_context(ChatServer(slow))
        captioner = OpenAICaptioner(config_of(first.base_url, second.base_url, concurrency=2))
        texts(captioner, records)
        shared = len(second.requests)
        assert shared >= 6
        port = int(second.base_url.rpartition(":")[2].partition("/")[0])
    texts(captioner, records)
    assert len(first.requests) == 24 - shared + 24
    assert f"{second.base_url} is left out" in caplog.text
    back = start(slow, port=port)
    wait_until(lambda: f"{second.base_url} answers again" in caplog.text)
    assert all(request.is_plain for request in back.requests)
    before = len(back.requests)
    texts(captioner, records)
    assert len(back.requests) - before >= 6


@pytest.mark.thorough
def test_pauses_grow_while_a_server_fails_and_start_anew_when_it_has_answered(
    records: list[Record], start: Callable[..., ChatServer], caplog: pytest.LogCaptureFixture
) -> None:
    times: list[float] = []
    fails = True

    def decide(request: Request) -> Reply:
        if request.is_plain:
            times.append(time.monotonic())
        return OVERLOADED if fails else completion(request)

    bad, good = start(decide), start()
    captioner = OpenAICaptioner(config_of(bad.base_url, good.base_url))
    texts(captioner, records[:2])
    wait_until(lambda: len(times) == 4)
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(b > 1.4 * a for a, b in itertools.pairwise(pauses)), pauses
    fails = False
    wait_until(lambda: "answers again" in caplog.text)
    texts(captioner, records)
    fails = True
    seen = len(times)
    failed_at = time.monotonic()
    texts(captioner, records[:2])
    wait_until(lambda: len(times) > seen)
    assert times[seen] - failed_at < pauses[-1] / 2


@pytest.mark.parametrize("status", [404, 400, 401])
def test_a_server_that_refuses_a_plain_picture_too_is_left_out(
    status: int,
    records: list[Record],
    start: Callable[..., ChatServer],
    caplog: pytest.LogCaptureFixture,
) -> None:
    bad, good = start(lambda request: refusal(status, "no such model")), start()
    texts(OpenAICaptioner(config_of(bad.base_url, good.base_url)), records)
    assert f"{bad.base_url} is left out" in caplog.text


@pytest.mark.parametrize("reply", [refusal(400, "bad image"), refusal(500, "CUDA error")])
def test_an_image_that_no_server_answers_fails_alone_and_no_server_is_left_out(
    reply: Reply,
    records: list[Record],
    start: Callable[..., ChatServer],
    caplog: pytest.LogCaptureFixture,
) -> None:
    bad = replace(drawn_record("two", frozenset()), key="b" * 20)

    def decide(request: Request) -> Reply:
        return reply if request.jpeg == bad.image else completion(request)

    one, two = start(decide), start(decide)
    captioner = OpenAICaptioner(config_of(one.base_url, two.base_url))
    results = captioner.caption([*records, bad])
    assert [isinstance(each, Failed) for each in results] == [False] * len(records) + [True]
    assert "left out" not in caplog.text


def test_a_run_ends_only_if_no_server_answers_and_the_error_names_all(
    records: list[Record], start: Callable[..., ChatServer]
) -> None:
    gone = f"http://127.0.0.1:{free_port()}/v1"
    bad = start(lambda request: OVERLOADED)
    with pytest.raises(ServerError) as caught:
        OpenAICaptioner(config_of(gone, bad.base_url)).caption(records)
    message = str(caught.value)
    assert re.search(rf"{gone}: APIConnectionError.*\. ", message)
    assert f"{bad.base_url}: status 503" in message and "the same command continues" in message


def test_a_server_that_was_left_out_is_asked_if_the_others_fail(
    records: list[Record],
    start: Callable[..., ChatServer],
    caplog: pytest.LogCaptureFixture,
) -> None:
    failing: set[str] = set()

    def decide(name: str) -> Callable[[Request], Reply]:
        return lambda request: OVERLOADED if name in failing else completion(request)

    one, two = start(decide("one")), start(decide("two"))
    captioner = OpenAICaptioner(config_of(one.base_url, two.base_url))
    failing |= {"one"}
    texts(captioner, records)
    failing ^= {"one", "two"}
    texts(captioner, records)
    assert f"{one.base_url} answers again" in caplog.text
    assert f"{two.base_url} is left out" in caplog.text


def test_a_server_that_returns_with_another_checkpoint_stays_left_out(
    records: list[Record], start: Callable[..., ChatServer], caplog: pytest.LogCaptureFixture
) -> None:
    fails = True
    listed = [{"id": "m", "root": "/models/a"}]

    def decide(request: Request) -> Reply:
        return OVERLOADED if fails else completion(request)

    bad, good = start(decide, models=listed), start(models=listed)
    captioner = OpenAICaptioner(config_of(bad.base_url, good.base_url))
    texts(captioner, records)
    bad.models, fails = [{"id": "m", "root": "/models/b"}], False
    wait_until(lambda: f"{bad.base_url} stays left out: " in caplog.text)
    assert "different checkpoints" in caplog.text and "answers again" not in caplog.text


@pytest.mark.parametrize("first", ["max_tokens", "max_completion_tokens"])
def test_the_limit_of_tokens_has_the_name_that_the_server_takes(
    first: str, records: list[Record], start: Callable[..., ChatServer]
) -> None:
    """OpenAI's newer models refuse max_tokens."""

    def decide(request: Request) -> Reply:
        other = {"max_tokens": "max_completion_tokens"}.get(first, "max_tokens")
        if other in request.body:
            return refusal(
                400, f"Unsupported parameter: '{other}' is not supported. Use '{first}' instead."
            )
        return completion(request)

    server = start(decide)
    captioner = OpenAICaptioner(
        config_of(server.base_url, concurrency=1, max_new_tokens=33, face_max_new_tokens=33)
    )
    texts(captioner, records)
    refused = first == "max_completion_tokens"
    assert len(server.requests) == 24 + refused, "the name is remembered"
    assert {request.body.get(first) for request in server.requests[refused:]} == {33}


def test_a_refusal_that_only_names_the_limit_of_tokens_is_reported_as_it_is(
    records: list[Record], start: Callable[..., ChatServer]
) -> None:
    text = "'max_tokens' or 'max_completion_tokens' is too large: 512"
    server = start(lambda request: completion(request) if request.is_plain else refusal(400, text))
    [failed] = OpenAICaptioner(config_of(server.base_url)).caption(records[:1])
    assert isinstance(failed, Failed) and text in failed.detail
