"""Tells English from other languages, and text that repeats itself from text that doesn't."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

from stages.answers.sentences import sentences, unquoted
from stages.answers.words import CAPTION_WORDS, ENGLISH, OTHER_LANGUAGES

_LEAST_OTHER: Final = 3  # words of a sentence that make it one of another language
_LEAST_FOREIGN_LETTERS: Final = 2
_LEAST_SHARE: Final = 0.1  # of an answer's words that are frequent in English or in captions
_LEAST_TO_JUDGE: Final = 5  # words

_REPEATED_MARK: Final = re.compile(r"([^\w\s.…\-–—_=*])\1{3,}|(\S)\2{8,}")
_WORDS: Final = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
# words of a phrase → times that it must be repeated without a pause to count as a loop
_REPEATS: Final = ((1, 4), (2, 4), (3, 3), (8, 2))
_LONGEST_PHRASE: Final = 40
_NGRAM: Final = 4
_LEAST_WORDS: Final = 24
_MOST_REPEATED: Final = 0.4  # share of an answer's sequences of four words that occurred before


def is_english(text: str) -> bool:
    """Returns False if the text has letters of another script, or a sentence in another language.

    Quotations aren't read. Single words of other languages are allowed.
    """
    plain = unquoted(text)
    foreign = sum(
        character.isalpha() and not unicodedata.name(character, "").startswith(("LATIN", "GREEK"))
        for character in plain
        if character > "ɏ"  # the letters before it are Latin
    )
    if foreign >= _LEAST_FOREIGN_LETTERS:
        return False
    words = [word.lower() for word in _WORDS.findall(plain)]
    usual = sum(word in ENGLISH or word in CAPTION_WORDS for word in words)
    if len(words) >= _LEAST_TO_JUDGE and usual < _LEAST_SHARE * len(words):
        return False
    return not any(_is_other(sentence) for sentence in sentences(plain))


def _is_other(sentence: str) -> bool:
    words = [word.lower() for word in _WORDS.findall(sentence.replace("'", " ").replace("’", " "))]
    other = sum(word in OTHER_LANGUAGES and word not in ENGLISH for word in words)
    return other >= _LEAST_OTHER and other > sum(word in ENGLISH for word in words)


def is_loop(text: str) -> bool:
    """True if a mark, a phrase or most of the text is repeated, as models do that don't end."""
    if _REPEATED_MARK.search(text):
        return True
    words = [word.lower() for word in _WORDS.findall(text)]
    if any(_repeats(words, length, times) for length, times in _phrase_lengths()):
        return True
    ngrams = [tuple(words[at : at + _NGRAM]) for at in range(len(words) - _NGRAM + 1)]
    repeated = len(ngrams) - len(set(ngrams))
    return len(words) >= _LEAST_WORDS and repeated > _MOST_REPEATED * len(ngrams)


def _phrase_lengths() -> list[tuple[int, int]]:
    """Returns (words of a phrase, times that it must be repeated) for each length of a phrase."""
    times = dict(_REPEATS)
    lengths, needed = [], 0
    for length in range(1, _LONGEST_PHRASE + 1):
        needed = times.get(length, needed)
        lengths.append((length, needed))
    return lengths


def _repeats(words: list[str], length: int, times: int) -> bool:
    """True if a phrase of `length` words stands `times` times in a row."""
    run = 0
    for at in range(length, len(words)):
        run = run + 1 if words[at] == words[at - length] else 0
        if run >= length * (times - 1):
            return True
    return False
