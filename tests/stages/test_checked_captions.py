"""The caption stage checks a server's answers: what is mended, tried again, recorded, and fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from configs.captions import (
    FACE_PROMPT,
    FACE_RETRY_PROMPT,
    PROMPT,
    RETRY_PROMPT,
    CaptionConfig,
    OpenAIConfig,
)
from configs.errors import ConfigError
from stages.annotations import Answers
from stages.answers import ANSWERS_VERSION
from stages.backends.weights import Weights
from stages.base import check_chain, run_stage
from stages.caption import CaptionStage
from stages.reasons import REASONS
from stages.record import Record
from tests.stages.chat_server import ChatServer, Reply, Request, completion, refusal
from tests.stages.records import drawn_record

GOOD = "A man with a beard looks to the left."
GOOD_FACE = "The face is oval, the eyes are brown, and the mouth is closed."
REFUSAL = "I'm sorry, I can't describe this person's face, ears, eyes, nose and mouth."
FACE_HEIGHT = 290 / 512  # of the drawn face's box
ANSWERS = {PROMPT: GOOD, FACE_PROMPT: GOOD_FACE, RETRY_PROMPT: GOOD, FACE_RETRY_PROMPT: GOOD_FACE}


def replies(answers: dict[str, Any]) -> Callable[[Request], Reply]:
    """Returns a `decide` with an answer for each prompt: a text, (text, finish), or a reply."""

    def decide(request: Request) -> Reply:
        answer = answers[request.prompt]
        if isinstance(answer, Reply):
            return answer
        text, finish = (answer, "stop") if isinstance(answer, str) else answer
        return completion(request, text=text, finish=finish)

    return decide


def captioned(answers: dict[str, Any], **changes: Any) -> tuple[list[Record], list[str]]:
    """Returns two records as the stage makes them of a server's answers, and all prompts that the
    server got.
    """
    with ChatServer(replies(ANSWERS | answers)) as server:
        config = OpenAIConfig(base_url=server.base_url, model="m", tries=1, **changes)
        stage = CaptionStage(CaptionConfig(backend="openai", openai=config), Weights())
        records = run_stage(stage, [drawn_record("one"), drawn_record("two")])
    return records, [request.prompt for request in server.requests]


def test_mended_captions_are_recorded_with_verdicts_and_finish_reasons() -> None:
    records, prompts = captioned(
        {
            PROMPT: f"Sure! {GOOD}",
            FACE_PROMPT: (f"**Face:** {GOOD_FACE} The ears are", "length"),
        }
    )
    assert sorted(prompts) == sorted(2 * [PROMPT, FACE_PROMPT])
    for record in records:
        assert (record.caption, record.face_caption) == (GOOD, f"Face: {GOOD_FACE}")
        assert record.annotation(Answers) == Answers(
            answer_finish=("stop", "length"),
            answer_verdicts=("preamble", "markdown cut"),
            answer_mended=(True, True),
            first_verdicts=("", ""),
            mended_answers=2,
            second_tries=0,
            face_height=FACE_HEIGHT,
            face_view=False,
        )


def test_a_useless_answer_is_tried_again_with_the_prompt_for_that() -> None:
    changes = {"retry_prompt": "Once more.", "face_retry_prompt": "The face once more."}
    records, prompts = captioned(
        {
            FACE_PROMPT: REFUSAL,
            "The face once more.": (f"Of course! {GOOD_FACE}", None),
        },
        **changes,
    )
    assert sorted(prompts) == sorted(2 * [PROMPT, FACE_PROMPT, "The face once more."])
    for record in records:
        assert (record.caption, record.face_caption) == (GOOD, GOOD_FACE)
        assert record.annotation(Answers) == Answers(
            answer_finish=("stop", ""),
            answer_verdicts=("", "preamble"),
            answer_mended=(False, True),
            first_verdicts=("", "refusal"),
            mended_answers=1,
            second_tries=1,
            face_height=FACE_HEIGHT,
            face_view=False,
        )


USELESS = {
    "caption_refusal": REFUSAL,
    "caption_loop": "!" * 40,
    "caption_not_english": "La mujer tiene el pelo largo y una camisa blanca.",
    "caption_names_a_person": "This is Taylor Swift with red lips.",
    "caption_cut": ("The man has a beard and", "length"),
    "empty_caption": "...",
}


@pytest.mark.parametrize("reason", USELESS)
@pytest.mark.parametrize("prompt", [PROMPT, FACE_PROMPT])
def test_a_record_fails_by_the_verdict_on_its_second_answer(reason: str, prompt: str) -> None:
    second = RETRY_PROMPT if prompt == PROMPT else FACE_RETRY_PROMPT
    records, prompts = captioned({prompt: REFUSAL, second: USELESS[reason]})
    assert sorted(prompts) == sorted(2 * [PROMPT, FACE_PROMPT, second])
    for record in records:
        assert (record.reason, record.stage) == (reason, "caption") and reason in REASONS
        assert "after a second try" in record.detail
        assert (record.caption, record.image) == ("", b"")
    if reason == "caption_names_a_person":
        assert "(Taylor Swift)" in records[0].detail


def test_a_record_fails_alone_if_its_second_request_fails() -> None:
    no = refusal(400, "no")
    with ChatServer(
        lambda request: (
            no
            if request.prompt == RETRY_PROMPT and request.number == 2
            else replies(ANSWERS | {PROMPT: REFUSAL})(request)
        )
    ) as server:
        config = OpenAIConfig(base_url=server.base_url, model="m", tries=1, concurrency=1)
        stage = CaptionStage(CaptionConfig(backend="openai", openai=config), Weights())
        [record] = run_stage(stage, [drawn_record("one")])
    assert record.reason == "caption_failed" and "status 400" in record.detail


def test_without_checks_answers_are_captions_and_nothing_is_recorded() -> None:
    records, prompts = captioned({FACE_PROMPT: REFUSAL}, check_answers=False)
    assert len(prompts) == 4
    for record in records:
        assert (record.caption, record.face_caption) == (GOOD, REFUSAL)
        assert record.annotations == {}


def test_the_annotation_is_that_of_captioners_that_are_checked() -> None:
    checked = CaptionStage(
        CaptionConfig(backend="openai", openai=OpenAIConfig(base_url="http://a/v1", model="m")),
        Weights(),
    )
    composed = CaptionStage(CaptionConfig(), Weights())
    assert checked.annotation is Answers and Answers.name in checked.provides
    assert composed.annotation is None and Answers.name not in composed.provides
    for stage in (checked, composed):
        with pytest.raises(ConfigError, match="requires faces"):
            check_chain([stage])  # and not: provides no annotation


def test_an_empty_prompt_of_the_second_try_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"caption\.openai\.face_retry_prompt is empty"):
        OpenAIConfig(face_retry_prompt=" ")


def test_the_signature_hashes_the_version_of_the_rules_that_check_answers() -> None:
    """The signature hashes all digests of a stage."""

    def digests(**changes: Any) -> dict[str, str]:
        config = OpenAIConfig(base_url="http://127.0.0.1:9", model="m", root="m", **changes)
        stage = CaptionStage(CaptionConfig(backend="openai", openai=config), Weights())
        return dict(stage.digests())

    assert digests() == {"answers": ANSWERS_VERSION}
    assert digests(check_answers=False) == {}
