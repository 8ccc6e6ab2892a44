"""Answers: checks an answer of a vision-language model before it becomes a caption.

`mended` removes what can be removed: thinking, Markdown, what is said to the user, and the sentence
that a limit of tokens cut off. What can't be mended gives a fatal verdict. No model is used, and
equal answers give equal results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from stages.answers.language import is_english, is_loop
from stages.answers.markup import without_markdown, without_thinking
from stages.answers.names import named_person
from stages.answers.sentences import full_sentences
from stages.answers.talk import is_refusal, without_talk
from stages.backends.protocols import Answer

# It rises whenever the same answer gives another result. Captions are made again then.
ANSWERS_VERSION: Final = "1"
THINKING: Final = "thinking"
MARKDOWN: Final = "markdown"
PREAMBLE: Final = "preamble"
CUT: Final = "cut"
LOOP: Final = "loop"
REFUSAL: Final = "refusal"
NOT_ENGLISH: Final = "not_english"
NAMES_A_PERSON: Final = "names_a_person"
EMPTY: Final = "empty"
# in the order in which an answer's verdicts are listed
VERDICTS: Final = (
    *(EMPTY, LOOP, REFUSAL, NOT_ENGLISH, NAMES_A_PERSON),
    *(THINKING, MARKDOWN, PREAMBLE, CUT),
)
# characters that are read: a limit for servers that ignore that of tokens, since the rules' time
# grows faster than the text. 512 tokens are about 2,500 characters.
_LONGEST: Final = 16_000
_LEAST_WORDS: Final = 3  # of an answer that says something


@dataclass(frozen=True, slots=True, kw_only=True)
class Mended:
    """A checked answer. text: the mended text, "" if there is a fatal verdict. verdicts: of
    VERDICTS, in their order. fatal: the verdict that makes the answer useless; "": none. detail:
    what the verdict is about, for people.
    """

    text: str
    verdicts: tuple[str, ...] = ()
    fatal: str = ""
    detail: str = ""
    was_mended: bool = False


def mended(answer: Answer) -> Mended:
    """Returns the answer's mended text and its verdicts.

    A text without verdicts is returned as it is.
    """
    original = answer.text.strip()
    if len(answer.text) > _LONGEST:
        answer = Answer(answer.text[:_LONGEST], "length")
    text = answer.text.strip()
    verdicts: set[str] = set()
    text, thinks = without_thinking(text)
    text, is_marked = without_markdown(text, ends=answer.finish != "length")
    declined = is_refusal(text)
    text, talks = without_talk(text)
    verdicts |= {THINKING} if thinks else set()
    verdicts |= {MARKDOWN} if is_marked else set()
    verdicts |= {PREAMBLE} if talks and not declined else set()
    loops = is_loop(text)
    if _is_cut(answer, text):
        verdicts.add(CUT)
        text = full_sentences(text)
    fatal, detail = _fatal(text, declined=declined, loops=loops, cut=CUT in verdicts)
    if fatal:
        verdicts.add(fatal)
    return Mended(
        text="" if fatal else text,
        verdicts=tuple(verdict for verdict in VERDICTS if verdict in verdicts),
        fatal=fatal,
        detail=detail,
        was_mended=not fatal and text != original,
    )


def _is_cut(answer: Answer, text: str) -> bool:
    """True if the limit of tokens ended the answer; if that is unknown, if its last sentence has no
    end.
    """
    if answer.finish == "stop" or not text:
        return False
    return answer.finish == "length" or full_sentences(text) != text.strip()


def _fatal(text: str, *, declined: bool, loops: bool, cut: bool) -> tuple[str, str]:
    """Returns the fatal verdict, "" if there is none, and what it is about."""
    if loops:
        return LOOP, ""
    if declined:
        return REFUSAL, ""
    if not is_english(text):
        return NOT_ENGLISH, ""
    if name := named_person(text):
        return NAMES_A_PERSON, name
    if len(text.split()) < _LEAST_WORDS or not any(map(str.isalpha, text)):
        return (CUT if cut else EMPTY), ""
    return "", ""
