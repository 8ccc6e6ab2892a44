"""The `openai` backend keeps the servers busy, and leaves nothing open when it is dropped."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from configs.captions import FACE_RETRY_PROMPT, RETRY_PROMPT, CaptionConfig, OpenAIConfig
from stages.backends.weights import Weights
from stages.base import run_stage
from stages.caption import CaptionStage
from tests.stages.chat_server import ChatServer, Reply, Request, completion
from tests.stages.records import drawn_record

CAPTION = "A man with a beard looks to the left."
REFUSAL = "I'm sorry, I can't describe this person."
CONCURRENCY = 3
SHORT = 0.15  # seconds; an empty slot is filled again within that, also on a busy computer


def busy_share(spans: list[tuple[float, float]]) -> float:
    """Returns the mean share of slots with an open request, from the first request to the last
    answer. spans: start and end of each request. Times in which slots are empty count if they are
    longer than SHORT.
    """
    events = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    empty, count = 0.0, 0
    parts: list[tuple[float, int]] = []  # of the present time with empty slots: seconds, slots
    for (time_, change), (next_time, _) in itertools.pairwise(events):
        count += change
        if count < CONCURRENCY:
            parts.append((next_time - time_, CONCURRENCY - count))
            continue
        if sum(seconds for seconds, _ in parts) > SHORT:
            empty += sum(seconds * slots for seconds, slots in parts)
        parts.clear()
    empty += sum(seconds * slots for seconds, slots in parts)
    return 1 - empty / (CONCURRENCY * (events[-1][0] - events[0][0]))


@pytest.mark.thorough
def test_slots_are_busy_over_several_calls_and_second_tries() -> None:
    """Latencies spread by half around 0.4 s; one in ten answers needs a second try."""
    draws, lock = random.Random(1), threading.Lock()
    spans: list[tuple[float, float]] = []

    def decide(request: Request) -> Reply:
        started = time.monotonic()
        with lock:
            seconds, draw = draws.uniform(0.2, 0.6), draws.random()
        time.sleep(seconds)
        with lock:
            spans.append((started, time.monotonic()))
        is_second = request.prompt in (RETRY_PROMPT, FACE_RETRY_PROMPT)
        return completion(request, text=REFUSAL if draw < 0.1 and not is_second else CAPTION)

    one = drawn_record("one")
    records = [replace(one, key=f"{n:020x}") for n in range(48)]
    with ChatServer(decide) as server:
        openai = OpenAIConfig(base_url=server.base_url, model="m", concurrency=CONCURRENCY)
        stage = CaptionStage(CaptionConfig(backend="openai", openai=openai), Weights())
        assert stage.batch_size == len(records) / 2, "the test needs several calls"
        run_stage(stage, records[:1])  # imports, connections
        spans.clear()
        captioned = run_stage(stage, records)
    assert all(record.caption == CAPTION for record in captioned)
    assert len(spans) > 2 * len(records), "the test needs second tries"
    assert server.most_open == CONCURRENCY
    share = busy_share(spans)
    assert share >= 0.9, f"{share:.1%} of the slots"


def test_second_tries_are_asked_for_while_first_ones_are_open() -> None:
    events: list[tuple[str, bool]] = []

    def decide(request: Request) -> Reply:
        is_second = request.prompt in (RETRY_PROMPT, FACE_RETRY_PROMPT)
        events.append(("start", is_second))
        time.sleep(0.2 if request.number % 2 else 0.05)
        events.append(("end", is_second))
        return completion(request, text=CAPTION if is_second else REFUSAL)

    with ChatServer(decide) as server:
        openai = OpenAIConfig(base_url=server.base_url, model="m", concurrency=2)
        stage = CaptionStage(CaptionConfig(backend="openai", openai=openai), Weights())
        captioned = run_stage(stage, [drawn_record("one"), drawn_record("two")])
    assert [record.caption for record in captioned] == [CAPTION] * 2
    assert len(server.requests) == 8, "each is asked for once"
    ended = len(events) - events[::-1].index(("end", False)) - 1
    assert events.index(("start", True)) < ended


DROPPED = """
import gc
import threading
from configs.captions import OpenAIConfig
from configs.errors import ServerError
from stages.backends.openai import OpenAICaptioner
from tests.stages.chat_server import ChatServer, completion, refusal
from tests.stages.records import drawn_record

records = [drawn_record(name) for name in "abc"]


def decide(request):
    return completion(request, seconds=0.05) if works else refusal(503, "no")


with ChatServer(decide) as one, ChatServer() as two:
    for url in (one.base_url, f"{one.base_url},{two.base_url}"):
        works = True
        config = OpenAIConfig(base_url=url, model="m", tries=2)
        OpenAICaptioner.preflight(config, (64, 64))
        captioner = OpenAICaptioner(config)
        captioner.caption(records)
        threads = [each for each in threading.enumerate() if each.name == "openai"]
        del captioner  # with open connections
        gc.collect()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        captioner = OpenAICaptioner(config)
        works = False  # with cancelled requests, or with a server that is waited for
        try:
            captioner.caption(records)
        except ServerError as error:
            print("ended", error)
        works = True
        if url == one.base_url:
            del captioner
            gc.collect()
print("done")
"""


def test_dropped_captioners_and_the_end_of_the_program_print_nothing() -> None:
    """With warnings of sockets, transports and loops that are left open."""
    process = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "-c", DROPPED],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    lines = process.stderr.splitlines()
    assert [line for line in lines if "is left out: status 503" not in line] == []
    assert len(lines) == 1
    assert process.stdout.startswith("ended") and process.stdout.endswith("done\n")
    assert process.returncode == 0
