"""Legacy marking, for all captions of a small grammar, against a second derivation of its rules."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.prompt import FACIAL_MARK, mark_clauses
from stages.regions import LEGACY_REGIONS, REGION_WORDS, word_of

RECORDED = json.loads((Path(__file__).parents[1] / "golden/texts.json").read_text())
REGION_SETS = (
    ("Face", "Left_Eye", "Left_Ear", "Nose", "Upper_Lip"),
    ("Face", "Right_Eye", "Nose"),
    ("Right_Ear", "Lower_Lip"),
    ("Left_Eye",),
    (),
)
PHRASES = ("a round face", "two ears", "Eyes", "small eyes", "a nose", "no mouth", "she smiles")
JOINTS = (", ", " and ", "; ", ",.", ". ")
ENDINGS = ("", ".", " ;,", "!")


def captions() -> Iterator[str]:
    """Yields one to three phrases in any order, also repeated, with various joints and endings."""
    for count in (1, 2, 3):
        for phrases in itertools.product(PHRASES, repeat=count):
            for number in range(len(JOINTS)):
                joints = (JOINTS * 2)[number : number + count - 1]
                text = phrases[0] + "".join(map("".join, zip(joints, phrases[1:], strict=True)))
                yield text + ENDINGS[len(text) % len(ENDINGS)]


def derived(caption: str, regions: tuple[str, ...]) -> str:
    """Returns the marked text, derived with lists of words and clauses in place of positions.

    The place of a mark that is missing is -1. The reference's clause then is the last character of
    a text that has no stop at or behind index len(mark) - 1, else it is empty.
    """
    wanted = [word for word in REGION_WORDS if word in map(word_of, regions)]
    tokens, times = [], dict.fromkeys(REGION_WORDS, 0)
    for token in re.findall(r"\w+|[.,;!?]", caption):
        if token.lower() in times:
            times[token.lower()] += 1
            if times[token.lower()] > 1:
                token = ""
        tokens.append(token)
    for word in wanted:
        if word in tokens:
            tokens.insert(tokens.index(word) + 1, f"<|{word}|>")
    pieces, output = re.split("([,.;])", " ".join(tokens)), []
    for mark in (f"<|{word}|>" for word in wanted):
        clause = next((piece for piece in pieces if mark in piece), "")
        if clause:
            pieces[pieces.index(clause)] = ""
            output.append(clause.strip())
            continue
        text = "".join(pieces)
        last = text[-1:].strip()
        if last and not set(text[len(mark) - 1 :]) & set(",.;"):
            output.append(last)
            pieces = re.split("([,.;])", text[:-1])
    return re.sub(r"<\|\w+\|>", FACIAL_MARK, " ".join(f"{clause}," for clause in output))


def test_every_caption_of_the_grammar_is_marked_as_derived() -> None:
    pairs = list(itertools.product(dict.fromkeys(captions()), REGION_SETS))
    differing = [
        (caption, regions)
        for caption, regions in pairs
        if mark_clauses(caption, regions).text != derived(caption, regions)
    ]
    assert len(pairs) > 5000
    assert differing == []


@pytest.mark.parametrize("entry", RECORDED, ids=lambda entry: entry["fine"][:24])
def test_both_derivations_give_the_recorded_answers(entry: dict[str, list[str] | str]) -> None:
    caption, regions = str(entry["fine"]), tuple(entry["regions_before"])
    assert set(regions) <= set(LEGACY_REGIONS)
    marked = mark_clauses(caption, regions)
    assert (marked.text, list(marked.regions)) == (entry["marked"], entry["regions_after"])
    assert derived(caption, regions) == entry["marked"]


@pytest.mark.parametrize(
    ("caption", "marked"),
    [
        # the nose's mark went with the face's clause; the full stop remains
        ("a face and a nose.", "a face {} and a nose {}, .,"),
        # a word that is missing leaves residue too
        ("a face.", "a face {}, .,"),
        # each missing mark takes the last character, whatever it is
        ("a face, two ears and a nose.", "a face {}, two ears {} and a nose {}, ., ,,"),
        ("a face and a nose, hi", "a face {} and a nose {}, i,"),
        # a longer text that has a stop remains whole
        ("a face and a nose, she smiles at us.", "a face {} and a nose {},"),
    ],
)
def test_what_a_missing_mark_leaves(caption: str, marked: str) -> None:
    regions = ("Face", "Left_Ear", "Nose", "Upper_Lip") if "ears" in caption else ("Face", "Nose")
    assert mark_clauses(caption, regions).text == marked.replace("{}", FACIAL_MARK)
