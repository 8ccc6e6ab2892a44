"""Recognises names of people in English text, by how they are introduced and where capitals are.

There is no list of people. Capitalised words that are no person's name (places, brands, clothes,
origins) are listed instead, so a rare place or brand can be mistaken for a name.
"""

from __future__ import annotations

import re
from typing import Final

from stages.answers.sentences import sentences, unquoted
from stages.answers.words import (
    FACE_NOUNS,
    NO_PERSON,
    OBJECTS,
    ORIGINS,
    PERSON_NOUNS,
    SENTENCE_STARTS,
)

_WORD: Final = r"[A-ZÀ-ÖØ-Þ][\w'’-]*[a-zß-öø-ÿ][\w'’-]*"
_INITIAL: Final = r"[A-Z]\."
_PARTICLE: Final = r"(?:de|da|di|del|della|la|le|los|van|von|der|den|bin|al|el)"
_NAME: Final = re.compile(
    rf"(?<![\w'’-])(?:{_WORD}|{_INITIAL})"
    rf"(?:\s+(?:{_PARTICLE}\s+){{0,2}}(?:{_WORD}|{_INITIAL}|[IVX]{{1,4}}\b))*"
)


_TITLE: Final = (
    r"(?i:actor|actress|singer|rapper|musician|politician|footballer|president|prime minister"
    r"|chancellor|senator|queen|king|prince|princess|pope|mr\.?|mrs\.?|ms\.?|dr\.?|sir|lady|lord"
    r"|comedian|filmmaker|quarterback|celebrity|pop star|movie star|entrepreneur|businessman"
    r"|businesswoman|supermodel|scientist|writer|author|artist|activist)"
)
_TITLED: Final = re.compile(rf"\b{_TITLE},?\s+$")
_SUBJECT: Final = (
    r"(?:this|that|it|he|she|(?:the|this)\s+(?:\w+\s+)?"
    r"(?:person|man|woman|individual|subject|boy|girl|figure|guy|lady|gentleman|celebrity"
    r"|actor|actress|singer)(?:\s+(?:in|on|shown|pictured|depicted)(?:\s+\w+){0,3})?)"
)
_IDENTIFIES: Final = re.compile(
    rf"(?:\b{_SUBJECT}(?:\s+(?:is|was)|['’]s)(?:\s+(?:likely|probably|clearly|none other than))?"
    r"|\b(?:appears|seems|likely|believed|known|thought)\s+to\s+be"
    r"|\b(?:looks|look)\s+(?:a\s+lot\s+)?like|\bidentified\s+as|\bknown\s+as|\bnamed|\bcalled"
    r"|\bname\s+is|\bresembl(?:es|ing|e)|\bresemblance\s+to|\brecogni[sz]ed\s+as"
    r"|\b(?:might|may|could|must)\s+be)\s+$",
    re.IGNORECASE,
)
_NO_NAME_BEFORE: Final = re.compile(
    r"(?:\b(?:the|a|an|in|at|near|from|outside|inside|across|throughout|by|reads?|reading|says"
    r"|saying|brand|branded|label(?:l?ed)?|logo|text|words?|worded|lettering|dressed\s+(?:up\s+)?as"
    r"|painted\s+as|costumed?\s+as|cosplay(?:ing)?\s+(?:as)?|costume\s+of|character|titled))\s+$",
    re.IGNORECASE,
)
_GOES_ON: Final = re.compile(  # after a single name that somebody is identified by
    r"(?:['’]s)?\s*(?:[.,;:!?()]|$|(?:and|with|wearing|in|who|smiling|from|at|on|is|because)\b)"
)
_PREDICATE: Final = re.compile(  # after a name at the beginning of a sentence
    r"\s*(?:,|['’]s\b|(?:is|was|has|had|wears|wearing|looks|looking|smiles|smiling|appears|seems"
    r"|stands|standing|sits|sitting|poses|posing|and|in|with|at|on)\b)"
)


def named_person(text: str) -> str:
    """Returns the first name of a person in an English text, "" if there is none. What is in
    quotation marks is not read.
    """
    for sentence in sentences(" ".join(unquoted(text).split())):
        for match in _NAME.finditer(sentence):
            words = _candidate(match[0].split(), begins=_begins(sentence[: match.start()]))
            before = sentence[: match.start()] + match[0][: match[0].rfind(" ".join(words))]
            if words and _is_person(words, before, sentence[match.end() :]):
                return " ".join(words)
    return ""


def _begins(before: str) -> bool:
    """True if the word after `before` has a capital because it is the sentence's first."""
    return not before.strip(" \t\"'“‘(-")


def _candidate(words: list[str], *, begins: bool) -> list[str]:
    """Returns the words of a capitalised sequence that may be a name: without those that have a
    capital as the sentence's first, and without "German Chancellor" before a name.
    """
    while words and begins and _is_start(words[0]):
        words = words[1:]
    for at, word in enumerate(words):
        if _plain(word) not in ORIGINS and not (at and re.fullmatch(_TITLE, word)):
            return words[at:]
    return []


def _is_person(words: list[str], before: str, after: str) -> bool:
    """True if a capitalised sequence names a person, by itself and by what surrounds it."""
    name = " ".join(words)
    excluded = any(_plain(word) in NO_PERSON for word in words)
    if excluded or after.startswith(":") or _names_an_object(words[-1], after):
        return False
    if _begins(before):
        followed = _PREDICATE.match(after) is not None
        return followed if len(words) > 1 else _owns_a_face(name, after)
    if _TITLED.search(before):
        return True
    if len(words) == 1:
        return bool(_IDENTIFIES.search(before) and _GOES_ON.match(after))
    return bool(_IDENTIFIES.search(before)) or not _NO_NAME_BEFORE.search(before)


def _owns_a_face(word: str, after: str) -> bool:
    """True for a sentence that begins as in "Emma's eyes"."""
    following = after.split()[:1]
    return (
        re.search(r"['’]s$", word) is not None
        and _plain(word) not in PERSON_NOUNS
        and bool(following)
        and following[0].strip(",.").lower() in FACE_NOUNS
    )


def _is_start(word: str) -> bool:
    lower = word.lower()
    return lower in SENTENCE_STARTS or lower.endswith(("ing", "ed", "ly"))


def _plain(word: str) -> str:
    return re.sub(r"['’]s?$", "", word.strip(".,")).lower()


def _names_an_object(last: str, after: str) -> bool:
    """True if a sequence belongs to an object, as in "Rolling Stones tour T-shirt"."""
    if re.search(r"['’]s$", last):
        return False
    following = [word.strip(".,;:").lower() for word in after.split()[:2]]
    if not after[:1].isspace() and not after.startswith("-"):
        return False
    return any(word in OBJECTS for word in following)
