"""Answers of vision-language models: verdicts on labelled ones, and what they are mended to.

tests/stages/answers has both halves of the labelled answers. The checks were not changed for
`held_out`, except for three answers; before that, they gave 69 of its 72 verdicts.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.answers import VERDICTS, mended
from stages.backends.protocols import Answer

FOLDER = Path(__file__).parent / "answers"
HALVES = ("tuned", "held_out")


def labelled(half: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((FOLDER / f"{half}.json").read_text("utf-8"))
    return rows


def answer_of(row: dict[str, Any]) -> Answer:
    return Answer(row["text"], row["finish"])


@pytest.mark.parametrize("half", HALVES)
def test_labelled_answers_get_their_verdicts(half: str) -> None:
    rows = labelled(half)
    assert len(rows) >= 100 and {v for row in rows for v in row["verdicts"]} == set(VERDICTS)
    missed, labels, false_alarms = [], 0, []
    for row in rows:
        verdicts = mended(answer_of(row)).verdicts
        labels += len(row["verdicts"])
        missed += [(v, row["text"]) for v in row["verdicts"] if v not in verdicts]
        if verdicts and not row["verdicts"]:
            false_alarms.append((verdicts, row["text"]))
    good = sum(not row["verdicts"] for row in rows)
    assert len(missed) <= 0.05 * labels, missed
    assert len(false_alarms) <= 0.02 * good, false_alarms


@pytest.mark.parametrize("half", HALVES)
def test_a_good_answer_is_unchanged_and_a_mended_one_is_good(half: str) -> None:
    for row in labelled(half):
        checked = mended(answer_of(row))
        if not row["verdicts"] and not checked.verdicts:
            assert (checked.text, checked.was_mended) == (row["text"], False)
        if checked.fatal:
            assert checked.text == "" and checked.fatal in checked.verdicts
        else:
            assert checked.was_mended == (checked.text != row["text"].strip())
            again = mended(Answer(checked.text, "stop"))
            assert (again.verdicts, again.text) == ((), checked.text), row["text"]


MENDED = [
    (
        "Sure! **Face:** The face is oval.\n**Eyes:** The eyes are brown.",
        "stop",
        "Face: The face is oval. Eyes: The eyes are brown.",
        "markdown preamble",
    ),
    (
        "### Features\n\n1. **Face Shape:** Oval\n2. *Eyes*: Blue, wide\n   - Ears: hidden",
        "stop",
        "Face Shape: Oval. Eyes: Blue, wide. Ears: hidden.",
        "markdown",
    ),
    (
        "| Feature | Value |\n|---|---|\n| Face | oval |\n| Eyes | brown |",
        "stop",
        "Face: oval. Eyes: brown.",
        "markdown",
    ),
    (
        '```json\n{"caption": "A man with a hat.", "eyes": ["They are blue."]}\n```',
        "stop",
        "A man with a hat. They are blue.",
        "markdown",
    ),
    (
        "<think>The nose first.</think>The nose is long. The mouth is",
        "length",
        "The nose is long.",
        "thinking cut",
    ),
    (
        "I can't say who it is, but the man has a beard and a wide nose. Let me know if you need "
        "more.",
        "stop",
        "The man has a beard and a wide nose.",
        "preamble",
    ),
    (
        "She wears a U.S. Army cap, about 5.5 cm high. Behind her, Sgt. stripes can be",
        "length",
        "She wears a U.S. Army cap, about 5.5 cm high.",
        "cut",
    ),
    ("The ears are small. The eyes are", "", "The ears are small.", "cut"),
    ("The ears are small.", "length", "The ears are small.", "cut"),
    ("A man with a hat", "stop", "A man with a hat", ""),
]


@pytest.mark.parametrize(("text", "finish", "expected", "verdicts"), MENDED)
def test_what_an_answer_is_mended_to(text: str, finish: Any, expected: str, verdicts: str) -> None:
    checked = mended(Answer(text, finish))
    assert (checked.text, " ".join(checked.verdicts)) == (expected, verdicts)


def test_the_detail_states_the_name() -> None:
    checked = mended(Answer("The man, Leonardo DiCaprio, has blue eyes.", "stop"))
    assert (checked.fatal, checked.detail) == ("names_a_person", "Leonardo DiCaprio")


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.characters(codec="utf-8"), max_size=400)
    | st.lists(
        st.sampled_from(
            [*"*#|`<>.:-{\n", "Face", "I can't", "'No\"", "<think>", "</think>", "Sure!"]
        )
    ).map(" ".join),
    st.sampled_from(["stop", "length", ""]),
)
def test_any_text_is_checked_and_stays_as_it_is_when_checked_again(text: str, finish: Any) -> None:
    checked = mended(Answer(text, finish))
    assert checked == mended(Answer(text, finish))
    assert bool(checked.text) != bool(checked.fatal)
    assert not set(checked.verdicts) - set(VERDICTS)


LONG = ["a ", "A b. ", "*", "I can't, but ", "'x ", "<think>", "Ab De ", "[", '{"a":', "[a", " "]


@pytest.mark.parametrize("part", LONG)
def test_a_long_answer_takes_little_time(part: str) -> None:
    """A regular expression that tries many ways would take minutes."""
    started = time.process_time()
    checked = mended(Answer("The ears are small. " + part * (1_000_000 // len(part)), "stop"))
    mended(Answer(part * (1_000_000 // len(part)), "stop"))
    assert time.process_time() - started < 10
    assert len(checked.text) <= 16_000 and {*checked.verdicts} & {"cut", "loop", "thinking"}
