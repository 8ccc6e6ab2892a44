"""The caption stage: bad records fail alone, and signatures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.captions import CaptionConfig, LlavaConfig
from configs.errors import ConfigError
from stages.backends.protocols import Kind
from stages.backends.weights import Weights
from stages.base import run_stage
from stages.caption import CaptionStage
from stages.codec import encode_labels
from stages.reasons import REASONS
from stages.record import Record, Status
from tests.stages.drawing import draw
from tests.stages.records import drawn_record
from tests.stages.tiny_llava import make_checkpoint


def stage_of(config: CaptionConfig | None = None) -> CaptionStage:
    stage = CaptionStage(config or CaptionConfig(), Weights())
    stage.setup()
    return stage


def test_a_bad_record_fails_alone_with_its_reason() -> None:
    good, last = drawn_record("good.jpg"), drawn_record("last.jpg")
    bad = [
        replace(drawn_record("image"), image=b"no image"),
        replace(drawn_record("no label map"), parsing=b""),
        replace(drawn_record("size"), parsing=encode_labels(draw().labels[:256])),
        replace(drawn_record("no face"), face=-1),
        replace(drawn_record("no landmarks"), faces=(replace(draw().face, landmarks=()),)),
    ]
    blank = drawn_record("blank", frozenset({"cloth"}))
    results = stage_of().process([good, *bad, blank, last])
    assert [r.key for r in results] == [r.key for r in (good, *bad, blank, last)]
    assert [r.reason for r in results] == ["", *["bad_input"] * len(bad), "empty_caption", ""]
    assert {(r.status, r.stage) for r in results[1:-1]} == {(Status.FAILED, "caption")}
    assert all(r.detail for r in results[1:-1])
    assert results[0].ok and results[0].caption and "face" in results[0].face_caption
    assert (results[0].image, results[0].parsing) == (good.image, good.parsing)
    alone = stage_of().process([last])[0]
    assert (alone.caption, alone.face_caption) == (results[-1].caption, results[-1].face_caption)


def test_the_backend_is_not_called_without_valid_records() -> None:
    assert [r.reason for r in stage_of().process([replace(drawn_record("a"), image=b"")])] == [
        "bad_input"
    ]
    assert stage_of().process([]) == []


def test_the_signature_changes_with_prompt_backend_and_checkpoint(tmp_path: Path) -> None:
    plain = CaptionStage(CaptionConfig(), Weights())
    assert plain.signature() == CaptionStage(CaptionConfig(), Weights()).signature()
    assert plain.digests() == {"rules": "2"}, "no weights"
    model = make_checkpoint(tmp_path / "model")
    own = LlavaConfig(model=str(model), device="cpu")
    config = CaptionConfig(backend="llava", llava=own)
    before = CaptionStage(config, Weights()).signature()  # without loading the model
    assert before == CaptionStage(config, Weights()).signature()
    assert before != plain.signature()
    for change in (
        {"check_answers": False},
        {"retry_prompt": "Who is it?"},
        {"face_retry_prompt": "Which eyes?"},
        {"pad_to_square": False},
        {"face_view_below": 0.25},
        {"dtype": "float32"},
    ):
        changed = CaptionConfig(backend="llava", llava=replace(own, **change))
        assert before != CaptionStage(changed, Weights()).signature(), change
    other_prompt = replace(config, llava=replace(own, prompt="Who is it?"))
    assert before != CaptionStage(other_prompt, Weights()).signature()
    make_checkpoint(model, seed=1)
    assert before != CaptionStage(config, Weights()).signature()


def test_the_stage_works_with_llava_and_with_attributes(tmp_path: Path) -> None:
    records = [
        drawn_record("one"),
        replace(drawn_record("two"), image=b"no image"),
        drawn_record("three"),
    ]
    llava = LlavaConfig(
        model=str(make_checkpoint(tmp_path)),
        prompt="Who?",
        device="cpu",
        max_new_tokens=8,
        face_max_new_tokens=8,
        check_answers=False,  # the words of random weights have no meaning
    )
    generated = run_stage(stage_of(CaptionConfig(backend="llava", llava=llava)), records)
    composed = run_stage(stage_of(), records)
    assert [r.ok for r in generated] == [r.ok for r in composed] == [True, False, True]
    assert generated[0].caption != composed[0].caption
    assert generated[0].caption and generated[0].face_caption


def test_useless_answers_of_a_model_are_tried_again_and_fail_by_reason(tmp_path: Path) -> None:
    llava = LlavaConfig(
        model=str(make_checkpoint(tmp_path)), device="cpu", max_new_tokens=8, face_max_new_tokens=8
    )
    stage = stage_of(CaptionConfig(backend="llava", llava=llava))
    asked: list[tuple[str, int]] = []
    retry = stage.backend.retry

    def recorded(records: list[Record], kinds: list[Kind], batch_size: int) -> Any:
        asked.extend(zip([record.source for record in records], kinds, strict=True))
        return retry(records, kinds, batch_size)

    stage.backend.retry = recorded
    results = run_stage(stage, [drawn_record("one"), drawn_record("two")])
    assert asked == [(name, kind) for name in ("one", "two") for kind in (0, 1)]
    assert {(r.status, r.stage) for r in results} == {(Status.FAILED, "caption")}
    for result in results:
        assert result.reason in REASONS and "after a second try" in result.detail


def test_the_error_for_an_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="attributes, llava"):
        stage_of(CaptionConfig(backend="blip"))
