from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.prompt import (
    FACIAL_MARK,
    inference_text,
    mark_clauses,
    tokenize_marked,
    training_text,
    without_marks,
)
from model.spec import SPECS
from stages.regions import REGION_WORDS

SD15, SDXL = SPECS["sd15"], SPECS["sdxl"]
ALL_LEGACY = ("Face", "Left_Eye", "Left_Ear", "Nose", "Upper_Lip")
M = FACIAL_MARK


@pytest.mark.parametrize(
    ("caption", "regions", "marked", "remaining"),
    [
        (
            SD15.template,
            ALL_LEGACY,
            f"The person has one face {M}, two ears {M}, two eyes {M}, one nose {M}, and one "
            f"mouth {M},",
            ALL_LEGACY,
        ),
        (SD15.template, ("Face",), f"The person has one face {M},", ("Face",)),
        (SD15.template, (), "", ()),
        (
            "The person has one nose, two eyes, two ears, and a mouth.",
            ALL_LEGACY,
            f"two ears {M}, two eyes {M}, The person has one nose {M}, and a mouth {M},",
            ALL_LEGACY[1:],
        ),
        (
            "Eyes are blue. The woman's face is round.",
            ALL_LEGACY,
            f"The woman s face {M} is round,",
            ("Face",),
        ),
    ],
)
def test_legacy_marks_as_the_reference_does(
    caption: str, regions: tuple[str, ...], marked: str, remaining: tuple[str, ...]
) -> None:
    result = mark_clauses(caption, regions)
    assert (result.text, result.regions) == (marked, remaining)
    assert {region for region, _ in result.dropped} == set(regions) - set(remaining)


def test_legacy_prompt_has_no_space_before_detail(tokenizer: Any) -> None:
    text = inference_text("A man", "ignored", ("Face",), tokenizer, SD15, "legacy").text
    assert text == f"A manDetail:The person has one face {M},"
    text = inference_text("A man", "ignored", ("Face",), tokenizer, SDXL, "legacy").text
    assert text == f"A man; Detail:The person has one face {M},"


def test_legacy_truncates_without_eos_and_corrected_restores_it(tokenizer: Any) -> None:
    text = "a big red dog " * 30
    assert tokenize_marked(text, tokenizer, keep_eos=False).ids[-1] != tokenizer.eos_token_id
    assert tokenize_marked(text, tokenizer, keep_eos=True).ids[-1] == tokenizer.eos_token_id


def test_a_tokenizer_without_the_mark_is_refused(vocab: Any) -> None:
    from model.vocabulary import clip_tokenizer

    with pytest.raises(ValueError, match="add_marks"):
        tokenize_marked("a face", clip_tokenizer(vocab), keep_eos=True)


def test_corrected_pairs_a_region_with_its_own_noun(tokenizer: Any) -> None:
    fine = "Eyes are blue, with a nose so small. Her face has full lips, and the left ear shows."
    text = training_text("A woman. She smiles.", fine, REGION_WORDS, tokenizer, SD15, "corrected")
    assert text.regions == ("eyes", "nose", "face", "mouth", "ears")
    assert not text.dropped
    tokens = tokenize_marked(text.text, tokenizer, keep_eos=True)
    nouns = [tokenizer.decode([tokens.ids[position]]).strip() for position in tokens.positions]
    assert nouns == ["eyes", "nose", "face", "lips", "ear"]
    assert without_marks(text.text).replace(
        " ", ""
    ) == f"A woman. She smiles. Detail: {fine}".replace(" ", "")


def test_corrected_lists_the_regions_whose_word_is_missing(tokenizer: Any) -> None:
    text = training_text("A man.", "A round face.", REGION_WORDS, tokenizer, SD15, "corrected")
    assert text.regions == ("face",)
    assert dict(text.dropped) == dict.fromkeys(
        ("ears", "eyes", "nose", "mouth"), "word_not_in_caption"
    )


def test_corrected_uses_the_template_where_there_is_no_caption(tokenizer: Any) -> None:
    text = inference_text("A man in a forest", "", REGION_WORDS, tokenizer, SD15, "corrected")
    assert text.text.startswith("A man in a forest Detail: The person has one face")
    assert text.regions == ("face", "nose", "eyes", "ears", "mouth")


@pytest.mark.parametrize("mode", ["legacy", "corrected"])
def test_marks_in_a_users_text_are_removed(tokenizer: Any, mode: Any) -> None:
    regions = ("Face",) if mode == "legacy" else ("face",)
    for text in (
        inference_text(
            f"A man {M} {M} smiling", f"A face {M} {M}.", regions, tokenizer, SD15, mode
        ),
        training_text(f"A man {M} smiling.", f"A {M} face {M}.", regions, tokenizer, SD15, mode),
    ):
        assert text.text.count(M) == len(text.regions) == 1


WORDS = st.lists(
    st.sampled_from([*REGION_WORDS, "freckles", "Eyes", "very", "long", ",", ".", ";", "çà"]),
    max_size=90,
)


@settings(max_examples=60, deadline=None)
@given(main=WORDS, fine=WORDS)
def test_corrected_lists_every_region_that_loses_its_mark(
    tokenizer: Any, main: list[str], fine: list[str]
) -> None:
    text = training_text(" ".join(main), " ".join(fine), REGION_WORDS, tokenizer, SD15, "corrected")
    tokens = tokenize_marked(text.text, tokenizer, keep_eos=True)
    assert len(tokens.positions) == len(text.regions)
    assert sorted([*text.regions, *(region for region, _ in text.dropped)]) == sorted(REGION_WORDS)
    assert tokens.ids[-1] == tokenizer.eos_token_id


def test_corrected_shortens_long_clauses_before_it_drops_a_region(tokenizer: Any) -> None:
    tail = " that is seen very clearly in this light and from this side of the room today"
    fine = ",".join(f" a {word}{tail}" for word in REGION_WORDS)
    text = inference_text(
        "A man in a forest, smiling", fine, REGION_WORDS, tokenizer, SD15, "corrected"
    )
    assert set(text.regions) == set(REGION_WORDS)
    assert text.text.startswith("A man in a forest, smiling Detail:")
