"""What of a photograph's face caption goes into a prompt."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer.description import Description, describe
from model.prompt import named_regions
from stages.backends.appearance import Appearance
from stages.backends.attributes import compose_face_caption
from stages.regions import REGION_WORDS

ANSWERS = Path(__file__).parents[1] / "stages" / "answers"

# region → values of what its clause depends on, and what may stay of the clause
PHRASES: dict[str, tuple[dict[str, tuple[object, ...]], str]] = {
    "face": (
        {
            "turned": tuple(range(-3, 4)),
            "glasses": (False, True),
            "dark_glasses": (False, True),
            "fringe": (False, True),
            "hair_long": (False, True),
        },
        r"The face( under a fringe| is framed by long hair)?\.",
    ),
    "eyes": (
        {
            "eyes": (0, 1, 2),
            "narrowed": (False, True),
            "dark_brows": (False, True),
            "glasses": (False, True),
            "turned": (0, 2),
        },
        r"(The|Both|The two) eyes( (under|below) dark brows)?\.",
    ),
    "ears": ({"ears": (0, 1, 2), "earrings": (0, 1, 2)}, r"(The|Both|The two) ears\."),
    "nose": ({"turned": tuple(range(-3, 4))}, r"The nose\."),
    "mouth": (
        {
            "mouth": ("", "closed", "slightly open", "open", "wide open"),
            "smile": (False, True),
            "teeth": (False, True),
        },
        r"The mouth\.",
    ),
}


def composed(word: str) -> dict[str, list[Appearance]]:
    """Returns every phrase of the `attributes` captions for a region, with its appearances."""
    values, _ = PHRASES[word]
    phrases: dict[str, list[Appearance]] = {}
    for combination in itertools.product(*values.values()):
        appearance = Appearance(
            regions=frozenset({word}),
            **dict(zip(values, combination, strict=True)),  # type: ignore[arg-type]
        )
        for choice in range(9):  # at most two choices, of two or three phrases each
            phrase = compose_face_caption(appearance, f"{choice:020x}"[::-1])
            phrases.setdefault(phrase, []).append(appearance)
    return phrases


@pytest.mark.parametrize("word", REGION_WORDS)
def test_of_each_phrase_of_attributes_only_properties_stay(word: str) -> None:
    phrases = composed(word)
    assert len(phrases) >= {"face": 40, "eyes": 20, "ears": 15, "nose": 7, "mouth": 25}[word]
    for phrase, appearances in phrases.items():
        text = describe(phrase, "").text
        assert re.fullmatch(PHRASES[word][1], text), (phrase, text)
        assert describe(phrase, "", moment=True) == Description(phrase)
        if all(appearance.fringe for appearance in appearances):
            assert "fringe" in text or "glasses" in phrase, phrase
        if "brows" in phrase:
            assert "brows" in text, phrase


def test_a_composed_caption_keeps_its_order() -> None:
    appearance = Appearance(
        regions=frozenset(REGION_WORDS), eyes=2, ears=2, dark_brows=True, hair_long=True,
        earrings=2, mouth="open", smile=True, teeth=True, turned=-1,
    )  # fmt: skip
    caption = compose_face_caption(appearance, "0" * 20)
    assert describe(caption, "").text == (
        "The face is framed by long hair, both eyes under dark brows, both ears, the nose, and the "
        "mouth."
    )


FREE = [
    (
        "The person in the image has a round face, with large eyes that are wide open. Her ears "
        "are small and partly hidden by hair, her nose is straight, and her mouth is closed in a "
        "soft smile.",
        "The person in the image has a round face, with large eyes. Her ears are small, her nose "
        "is straight, and her mouth.",
    ),
    (
        "The person is smiling broadly. The face is oval, the ears have gold hoops, the eyes "
        "crinkle at the corners, the nose is wide, and the mouth is open with the upper teeth "
        "visible.",
        "The face is oval, the ears, the eyes, the nose is wide, and the mouth.",
    ),
    (
        "The man has brown eyes, a full beard and round glasses with thin frames, and open lips.",
        "The man has brown eyes, a full beard, and lips.",
    ),
    (
        "She has green eyes, a small upturned nose, and full lips painted in a matte pink.",
        "She has green eyes, a small upturned nose, and full lips.",
    ),
    (
        "Her skin is fair with freckles. Her eyes are closed and blue; her head is thrown back. "
        "She looks at the camera.",
        "Her skin is fair with freckles. Her eyes are blue.",
    ),
    ("He is laughing and has wide open blue eyes.", "He has blue eyes."),
    ("A man in a cap and a garland with a beard, it seems.", "A man with a beard, it seems."),
    ("A smiling face in soft light, with dimples.", "A face, with dimples."),
    ("His face has a serious expression and his eyes look down.", "His face and his eyes."),
    ("She has a sunburnt nose and a wide, toothy smile.", "She has a sunburnt nose."),
    ("He wears sunglasses. The woman is smiling.", ""),
    ("smiling, eyes closed", "eyes"),
    ("Her gaze is steady, and her nose is small.", "Her nose is small."),
    ("The man has an open mouth.", "The man has a mouth."),
    ("A smile on her face. Her face is round.", "Her face is round."),
    ("A woman with a face and a smile.", "A woman with a face."),
    (
        "A mouth with full lips showing the edge of the upper teeth, as if speaking.",
        "A mouth with full lips.",
    ),
]


@pytest.mark.parametrize(("caption", "expected"), FREE)
def test_free_sentences_lose_the_moment(caption: str, expected: str) -> None:
    assert describe(caption, "a portrait").text == expected
    assert describe(caption, "a portrait", moment=True) == Description(caption)


def test_what_is_left_out_has_a_reason() -> None:
    caption = (
        "The face is turned to the left and softly lit, the eyes are visible behind glasses, the "
        "ears are small with gold earrings. She looks up. Her mouth is shut. Her nose is straight."
    )
    assert describe(caption, "her eyes are green, a crooked nose").left_out == (
        ("is turned to the left", "pose"),
        ("and softly lit", "light"),
        ("are visible behind glasses", "view"),
        ("with gold earrings", "worn"),
        ("She looks up", "gaze"),
        ("is shut", "expression"),
    )


# caption, prompt, what stays with moment=True, words of the prompt in the reason
CONTRADICTED = [
    ("A round face with large brown eyes.", "a woman with blue eyes",
     "A round face with large eyes.", "blue eyes"),
    ("Her eyes are large and brown.", "her eyes are small and blue",
     "Her eyes are large.", "eyes are blue"),
    ("The eyes are blue.", "BLUE EYES, red hair", "The eyes are blue.", ""),
    ("The face is framed by long black hair.", "a man with blond hair",
     "The face is framed by long hair.", "blond hair"),
    ("A round face with no glasses.", "a man with glasses", "A round face.", "glasses"),
    ("Both eyes are visible behind glasses.", "a man without glasses",
     "Both eyes are visible.", "a man without glasses"),
    ("The face is round, and she is laughing.", "a woman, mouth closed",
     "The face is round.", "mouth closed"),
    ("The mouth is slightly open in a smile.", "mouth closed",
     "The mouth in a smile.", "mouth closed"),
    ("He has a beard and a thin face.", "clean-shaven", "He has a thin face.", "clean-shaven"),
    ("The eyes are closed, the nose is small.", "eyes open", "The eyes, the nose is small.",
     "eyes open"),
    ("The face is seen from the front.", "her face is in profile", "The face.", "in profile"),
    ("She has freckles and fair skin.", "a woman with no freckles, dark skin",
     "She has skin.", "dark skin"),
    ("No glasses, hat, or beard.", "a man without a hat", "No glasses, hat, or beard.", ""),
    ("No glasses, hat, or beard.", "wearing a red hat", "No glasses, or beard.",
     "wearing a red hat"),
    ("A man with light brown hair.", "black hair", "A man with hair.", "black hair"),
    ("The ears are visible.", "both ears are visible", "The ears are visible.", ""),
]  # fmt: skip


@pytest.mark.parametrize(("caption", "prompt", "expected", "words"), CONTRADICTED)
def test_what_the_prompt_contradicts_is_dropped_and_reported(
    caption: str, prompt: str, expected: str, words: str
) -> None:
    description = describe(caption, prompt, moment=True)
    assert description.text == expected
    assert bool(description.left_out) == (expected != caption)
    if words:
        assert f"the prompt says {words!r}" in [reason for _, reason in description.left_out]


def test_an_override_replaces_the_caption() -> None:
    own = "A smiling mouth, brown eyes."
    assert describe("The nose is small.", "blue eyes", override=own) == Description(own)
    assert describe("The nose is small.", "", override="") == Description("")


def words(text: str) -> Counter[str]:
    """Counts the words, except for those that join what is left out to its neighbours."""
    joining = {"and", "but", "while", "as", "a", "an"}
    return Counter(word for word in re.findall(r"\w+", text.lower()) if word not in joining)


def check(caption: str, prompt: str, moment: bool) -> None:
    description = describe(caption, prompt, moment=moment)
    text, left_out = description.text, description.left_out
    assert set(named_regions(text)) == set(named_regions(caption)), (caption, text)
    assert describe(text, prompt, moment=moment) == Description(text), caption
    remaining = words(text) + words(" ".join(phrase for phrase, _ in left_out))
    assert words(caption) <= remaining, (caption, text, left_out)
    assert words(text) <= words(caption), (caption, text)
    if not left_out:
        assert text == caption


@pytest.mark.parametrize("name", ["tuned", "held_out"])
def test_answers_of_vision_language_models_keep_their_regions(name: str) -> None:
    answers = json.loads((ANSWERS / f"{name}.json").read_text(encoding="utf-8"))
    texts = [answer["text"] for answer in answers if not answer["verdicts"]]
    assert sum(bool(named_regions(text)) for text in texts) > 30
    for text in texts:
        check(text, "a man with green eyes and a hat, mouth closed", False)


FRAGMENTS = """the|The|her|a|an|one of the|both|two|face|eyes|ears|eye|nose|mouth|lips|Mouth|is|are|
has|and|with|in a|behind|that|she|he wears|looks|looks at|smiling|closed|wide open|visible|turned|
brown|blue|large|round|hair|beard|hat|glasses|smile|teeth|showing|lit|,|,|.|;|!|’s|“ç|no|not|
in a soft smile"""
PIECES = st.lists(st.sampled_from(FRAGMENTS.replace("\n", "").split("|")), max_size=30)


@settings(max_examples=250, deadline=None)
@given(caption=PIECES, prompt=PIECES, moment=st.booleans())
def test_every_word_and_region_is_accounted_for(
    caption: list[str], prompt: list[str], moment: bool
) -> None:
    check(" ".join(caption), " ".join(prompt), moment)


@settings(max_examples=100, deadline=None)
@given(caption=st.text(max_size=80), prompt=st.text(max_size=30))
def test_any_text_is_described(caption: str, prompt: str) -> None:
    description = describe(caption, prompt)
    assert describe(description.text, prompt).text == description.text


@pytest.mark.parametrize("part", ["brown eyes and ", "with a closed ", "the face turned a a a "])
def test_a_caption_without_an_end_takes_little_time(part: str) -> None:
    """One pass for each phrase would take minutes."""
    started = time.process_time()
    describe(part * (16_000 // len(part)), "blue eyes, mouth closed")
    assert time.process_time() - started < 10
