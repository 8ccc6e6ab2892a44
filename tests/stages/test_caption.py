"""The caption stage: its contract, and that a bad record fails alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from configs.captions import CaptionConfig, LlavaConfig
from configs.errors import ConfigError
from stages.backends.weights import Weights
from stages.base import run_stage
from stages.caption import CaptionStage
from stages.codec import encode_labels
from stages.record import Status
from tests.stages.drawing import draw, record_of
from tests.stages.tiny_llava import make_checkpoint


def stage_of(config: CaptionConfig | None = None) -> CaptionStage:
    stage = CaptionStage(config or CaptionConfig(), Weights())
    stage.setup()
    return stage


def test_a_bad_record_fails_alone_and_with_its_reason() -> None:
    good, last = record_of("good.jpg"), record_of("last.jpg")
    bad = {
        "image": replace(record_of("a"), image=b"no picture"),
        "map": replace(record_of("b"), parsing=b""),
        "size": replace(record_of("c"), parsing=encode_labels(draw().labels[:256])),
        "face": replace(record_of("d"), face=-1),
        "landmarks": replace(record_of("e"), faces=(replace(draw().face, landmarks=()),)),
    }
    blank = record_of("blank", frozenset({"cloth"}))
    answers = stage_of().process([good, *bad.values(), blank, last])
    assert [a.key for a in answers] == [r.key for r in (good, *bad.values(), blank, last)]
    assert [a.reason for a in answers] == ["", *["bad_input"] * len(bad), "empty_caption", ""]
    assert {a.status for a in answers[1:-1]} == {Status.FAILED} and {
        a.stage for a in answers[1:-1]
    } == {"caption"}
    assert all(a.detail for a in answers[1:-1])
    assert answers[0].ok and answers[0].caption and "face" in answers[0].face_caption
    assert (answers[0].image, answers[0].parsing) == (good.image, good.parsing)
    alone = stage_of().process([last])[0]
    assert (alone.caption, alone.face_caption) == (answers[-1].caption, answers[-1].face_caption)


def test_nothing_sound_in_the_batch_asks_nothing_of_the_backend() -> None:
    assert [r.reason for r in stage_of().process([replace(record_of("a"), image=b"")])] == [
        "bad_input"
    ]
    assert stage_of().process([]) == []


def test_the_signature_follows_prompt_backend_and_checkpoint(tmp_path: Path) -> None:
    plain = CaptionStage(CaptionConfig(), Weights())
    assert plain.signature() == CaptionStage(CaptionConfig(), Weights()).signature()
    assert plain.digests() == {}
    model = make_checkpoint(tmp_path / "model")
    own = LlavaConfig(model=str(model), device="cpu")
    config = CaptionConfig(backend="llava", llava=own)
    before = CaptionStage(config, Weights()).signature()  # without loading anything
    assert before == CaptionStage(config, Weights()).signature()
    assert before != plain.signature()
    asked = replace(config, llava=replace(own, prompt="Who is it?"))
    assert before != CaptionStage(asked, Weights()).signature()
    make_checkpoint(model, seed=1)
    assert before != CaptionStage(config, Weights()).signature()


def test_both_backends_go_through_the_same_stage(tmp_path: Path) -> None:
    records = [record_of("one"), replace(record_of("two"), image=b"no picture"), record_of("three")]
    llava = LlavaConfig(
        model=str(make_checkpoint(tmp_path)), prompt="Who?", device="cpu", max_new_tokens=8
    )
    spoken = run_stage(stage_of(CaptionConfig(backend="llava", llava=llava)), records)
    composed = run_stage(stage_of(), records)
    assert [r.ok for r in spoken] == [r.ok for r in composed] == [True, False, True]
    assert spoken[0].caption != composed[0].caption and spoken[0].caption and spoken[0].face_caption


def test_an_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="attributes, llava"):
        stage_of(CaptionConfig(backend="blip"))
