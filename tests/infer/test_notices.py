"""Notices about prompts and about photographs of several people."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest

from configs.errors import ConfigError
from infer.description import Description, describe
from infer.notices import face_index, face_notice, prompt_notices
from model.prompt import add_marks, inference_text
from model.spec import SPECS
from model.tokens import TextTokens, text_tokens
from model.vocabulary import clip_tokenizer
from stages.backends.weights import Weights
from stages.record import Face
from stages.regions import LABEL_IDS, REGION_WORDS, Mode, region_masks
from tests.model.portraits import png, record

LONG = " ".join(f"{size} {color} parrot" for size in ("big", "small", "old", "young", "tame")
                for color in ("red", "green", "blue", "grey", "white"))  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return add_marks(clip_tokenizer(Weights().fetch("clip_bpe")))


def tokens_of(
    tokenizer: Any, prompt: str, mode: Mode = "corrected", without: str = "", **changes: str
) -> TextTokens:
    """Returns the tokens of a prompt for a drawn portrait. without: labels that its map lacks."""
    portrait = record(1, **changes)
    labels = cv2.imdecode(np.frombuffer(portrait.parsing, np.uint8), cv2.IMREAD_UNCHANGED)
    labels[np.isin(labels, [LABEL_IDS[name] for name in without.split()])] = 0
    portrait = replace(portrait, parsing=png(labels))
    caption, spec = portrait.face_caption, SPECS["sd15"]
    regions = tuple(region_masks(labels, mode))
    text = inference_text(prompt, caption, regions, tokenizer, spec, mode)
    return text_tokens(text, tokenizer, mode)


@pytest.mark.parametrize("mode", ["corrected", "legacy"])
def test_the_words_behind_the_limit_are_listed(tokenizer: Any, mode: Mode) -> None:
    prompt = f"A man. {LONG}, sitting in a forest"
    tokens = tokens_of(tokenizer, prompt, mode)
    assert tokens.cut and prompt.endswith(tokens.cut)
    read = "".join(tokenizer.decode(tokens.input_ids.tolist()).split())
    before = prompt.removesuffix(tokens.cut)
    assert "".join(before.lower().split()) in read
    assert "".join((before + tokens.cut.split()[0]).lower().split()) not in read
    [notice] = prompt_notices(tokens)
    count = len(tokens.cut.split())
    assert notice == (
        "The prompt is too long for the 77 tokens that are read with the description of the face. "
        f"Its last {count} words have no effect: {tokens.cut!r}. Shorten it."
    )


@pytest.mark.parametrize("mode", ["corrected", "legacy"])
def test_of_a_prompt_that_fits_nothing_is_said(tokenizer: Any, mode: Mode) -> None:
    tokens = tokens_of(tokenizer, "A  man in a forest", mode)
    assert tokens.cut == ""
    assert len(tokens.regions) == 5
    assert prompt_notices(tokens, Description("a face", (("a smile", "expression"),))) == []


def test_a_single_cut_word_is_listed(tokenizer: Any) -> None:
    words = LONG.split()
    count = next(n for n in range(40, len(words)) if tokens_of(tokenizer, " ".join(words[:n])).cut)
    tokens = tokens_of(tokenizer, " ".join(words[:count]))
    assert tokens.cut == words[count - 1]
    [notice] = prompt_notices(tokens)
    assert f"Its last word has no effect: '{words[count - 1]}'" in notice


def test_regions_without_a_mark_are_listed(tokenizer: Any) -> None:
    caption = "A round face, a nose and a mouth."
    tokens = tokens_of(tokenizer, "A man", face_caption=caption)
    assert prompt_notices(tokens) == [
        "Not used of the photograph: ears and eyes, not named in the description of the face. Name "
        "ears and eyes in face_caption."
    ]
    long = "antidisestablishmentarianistically supercalifragilisticexpialidocious"
    crowded = ", ".join(f"{long} {word}" for word in REGION_WORDS)
    tokens = tokens_of(tokenizer, "A man", face_caption=crowded)
    assert prompt_notices(tokens) == [
        "Not used of the photograph: eyes, nose and mouth, named too late in a long description. "
        "Give a shorter face_caption."
    ]


def test_regions_that_the_photograph_lacks_are_listed(tokenizer: Any) -> None:
    tokens = tokens_of(tokenizer, "A man", without="left_ear right_ear nose")
    assert prompt_notices(tokens) == [
        "Not in the photograph: ears and nose. Only the text describes that."
    ]


def test_what_the_prompt_contradicts_is_said(tokenizer: Any) -> None:
    description = describe("The eyes are brown, the mouth is open.", "a woman with blue eyes")
    notices = prompt_notices(tokens_of(tokenizer, "a woman with blue eyes"), description)
    assert notices == [
        "Left out of the description of the face: 'are brown', since the prompt says 'blue eyes'."
    ]


def faces(*boxes: tuple[float, float, float]) -> tuple[Face, ...]:
    """Returns square faces of (left, top, side)."""
    return tuple(
        Face(box=(x, y, x + side, y + side), landmarks=((0.0, 0.0),) * 5, score=0.9)
        for x, y, side in boxes
    )


GROUP = faces((300, 20, 50), (100, 10, 80), (-5, 30, 40))


def test_which_of_several_faces_was_taken_is_said() -> None:
    assert face_notice(GROUP, 1) == (
        "The photograph shows 3 faces; the largest, the second from the left, was taken. face=1 to "
        "face=3, counted from the left, chooses another."
    )
    assert "faces; the third from the left, was taken" in face_notice(GROUP, 0)
    crowd = faces(*((10 * column, 0, 8) for column in range(12)))
    assert "number 12 from the left" in face_notice(crowd, 11)
    assert face_notice(GROUP[:1], 0) == face_notice((), -1) == ""


def test_faces_are_counted_from_the_left() -> None:
    assert [face_index(GROUP, number) for number in (1, 2, 3)] == [2, 1, 0]
    above = faces((10, 50, 20), (10, 0, 20), (10, 0, 20))
    assert [face_index(above, number) for number in (1, 2, 3)] == [1, 2, 0]


@pytest.mark.parametrize(
    ("shown", "number", "message"),
    [
        (GROUP, 4, r"face=4: the photograph shows 3 faces; expected 1 \(on the left\) to 3"),
        (GROUP, 0, "face=0: the photograph shows 3 faces"),
        (GROUP[:1], 2, r"face=2: the photograph shows 1 face; expected 1$"),
        ((), 1, "face=1: the photograph shows no face; give another photograph"),
    ],
)
def test_a_face_that_is_not_there_is_an_error(
    shown: tuple[Face, ...], number: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        face_index(shown, number)
