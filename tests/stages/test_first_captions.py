"""A captioner whose first captions are useless stops the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from configs.captions import CaptionConfig, OpenAIConfig
from configs.errors import ConfigError, QualityError
from stages.backends.weights import Weights
from stages.base import run_stage
from stages.caption import CaptionStage
from stages.record import Record, key_of
from tests.stages.chat_server import ChatServer, Reply, Request, completion
from tests.stages.records import drawn_record

GOOD = "The face is oval, the eyes are brown, and the mouth is closed."
REFUSAL = "I'm sorry, I can't describe this person."


def numbered_records(count: int) -> list[Record]:
    """Returns records whose JPEGs end with their numbers, one byte behind the image's end."""
    record = drawn_record("0.jpg")
    return [
        replace(
            record, key=key_of(str(n)), source=f"{n}.jpg", image=record.image + n.to_bytes(2, "big")
        )
        for n in range(count)
    ]


def number_of(request: Request) -> int:
    return int.from_bytes(request.jpeg[-2:], "big")


def caption(
    records: list[Record],
    decide: Callable[[Request], Reply],
    asked: set[int],
    concurrency: int = 4,
    **changes: Any,
) -> list[Record]:
    """Returns the results. asked: gets the numbers of the records that the server was asked
    about.
    """
    with ChatServer(decide) as server:
        openai = OpenAIConfig(base_url=server.base_url, model="m", concurrency=concurrency)
        config = CaptionConfig(backend="openai", openai=openai, **changes)
        try:
            return run_stage(CaptionStage(config, Weights()), records)
        finally:
            asked |= {number_of(request) for request in server.requests}


def refuses_from(first: int, every: int = 1) -> Callable[[Request], Reply]:
    """Returns a `decide` that refuses the records with these numbers, at both tries."""

    def decide(request: Request) -> Reply:
        number = number_of(request)
        refused = number >= first and number % every == 0
        return completion(request, text=REFUSAL if refused else GOOD)

    return decide


@pytest.mark.parametrize("concurrency", [4, 250])
def test_a_run_stops_within_200_records_and_shows_ten(concurrency: int) -> None:
    asked: set[int] = set()
    with pytest.raises(QualityError) as caught:
        caption(numbered_records(400), refuses_from(40), asked, concurrency)
    assert len(asked) <= 200, "also where more requests than that may be open"
    message = str(caught.value)
    assert "101 of the first 141 captions failed or needed a second try" in message
    assert "at most 50% may (caption.max_useless)" in message
    lines = message.splitlines()
    assert len(lines) == 11
    assert lines[1].startswith("  40.jpg: caption_refusal: the coarse description, after a second")
    assert REFUSAL in lines[10]


def test_half_of_the_first_captions_may_fail_and_later_ones_are_not_counted() -> None:
    asked: set[int] = set()
    results = caption(numbered_records(200), refuses_from(0, every=2), asked)
    assert [record.ok for record in results] == [False, True] * 100
    results = caption(numbered_records(330), refuses_from(205), asked)
    assert len(asked) == 330 and sum(record.ok for record in results) == 205


def test_a_second_try_that_helps_counts_too_and_the_limit_can_be_changed() -> None:
    def decide(request: Request) -> Reply:
        first = request.prompt in (OpenAIConfig().prompt, OpenAIConfig().face_prompt)
        return completion(request, text=REFUSAL if first else GOOD)

    with pytest.raises(QualityError, match=r"21 of the first 21 .*at most 10%") as caught:
        caption(numbered_records(30), decide, set(), max_useless=0.1)
    line = "  0.jpg: coarse description: refusal, then tried again, fine description: refusal, then"
    assert line in str(caught.value)
    results = caption(numbered_records(30), decide, set(), max_useless=1)
    assert all(record.ok and record.caption == GOOD for record in results)


def test_records_that_do_not_reach_the_captioner_are_not_counted() -> None:
    records = [replace(record, parsing=b"") for record in numbered_records(3)]
    asked: set[int] = set()
    results = caption(records, refuses_from(0), asked, max_useless=0)
    assert [record.reason for record in results] == ["bad_input"] * 3 and not asked


def test_the_limit_is_a_share() -> None:
    with pytest.raises(ConfigError, match=r"caption\.max_useless=2: expected 0 to 1"):
        CaptionConfig(max_useless=2)
