"""Tells what an answer says to the user from what it says about the picture."""

from __future__ import annotations

import re
from typing import Final

from stages.answers.sentences import sentences, unquoted

_OPENING: Final = re.compile(
    r"(?:(?:sure(?: thing)?|certainly|of course|absolutely|definitely|okay|ok|alright|great|got it"
    r"|yes|no problem|my pleasure|happy to help|thank(?:s| you)[^.!:\n]{0,60}"
    r"|i(?:'d| would| am|'m) (?:be )?(?:happy|glad) to[^.!:\n]{0,80}"
    r"|(?:what an? )?(?:\w+ ){1,2}(?:photo|picture|image|shot|question)(?=!))[,.!:]+\s*)+",
    re.IGNORECASE,
)
_ANNOUNCEMENT: Final = re.compile(
    r"(?:(?:based on|looking at|from|in) [^.,:\n]{1,60}, )?"
    r"(?:here(?:'s| is| are| you go| it is)|below (?:is|are)|the following (?:is|are)"
    r"|(?:i'll|i will|i can|let me|let's) (?:describe|see|tell)"
    r"|this is (?:a|the) (?:\w+ )?description)"
    r"[^.!:\n]{0,140}:\s*",
    re.IGNORECASE,
)
_LABEL: Final = re.compile(
    r"(?:(?:\w+ ){0,2}(?:answer|description|caption|response|output|summary)(?: of [^.:\n]{1,60})?"
    r"|assistant)\s*:\s*",
    re.IGNORECASE,
)
_ASIDE: Final = re.compile(
    r"(?:however|but|that said|instead|still),? (?:i|we) (?:can|could|will) "
    r"(?:(?:tell you|say|note|confirm|observe|see)(?: that)?|describe [^:.]{0,60}:)\s+",
    re.IGNORECASE,
)
# an answer's plan, of models that think aloud without a tag
_PLAN: Final = re.compile(
    r"(?:okay,? |so,? |wait,? |now,? |first,? )*(?:the (?:user|question|prompt|task) "
    r"(?:wants|want|asks|asked|is|has|requires|provided|uploaded|says)|(?:i|we) (?:need|should|must"
    r"|have to|will|'ll)\b|i'll\b|let me\b|let's\b|got it\b)",
    re.IGNORECASE,
)
_CLOSING: Final = re.compile(
    r"(?:(?:please )?(?:let me know|feel free)|(?:how )?(?:can|may) i help|(?:please )?try an?other"
    r"|(?:please )?try (?:again|a (?:different|new|better))|(?:i )?hope (?:this|that|it)"
    r"|is there (?:anything|something)|would you like|do you (?:have|need|want)|please note that i"
    r"|if you(?:'d| would| have| need| want)|(?:this|the (?:above|following)) is (?:based|only)"
    r"|note(?: that|:) (?:i|this|the) )",
    re.IGNORECASE,
)
_FIRST_PERSON: Final = re.compile(r"\b(?:i|i'm|i've|i'd|me|my|we|as an ai)\b", re.IGNORECASE)
_INABILITY: Final = re.compile(
    r"\b(?:can'?t|cannot|can not|couldn'?t|unable|not able|won'?t|will not|don'?t|do not|didn'?t"
    r"|not (?:going|allowed|permitted|comfortable|designed|programmed|trained|equipped)|decline"
    r"|refuse|sorry|afraid|apologi\w+"
    r"|only (?:able|assist)|incapable|rather not|prefer not"
    r"|should not|shouldn't)\b",
    re.IGNORECASE,
)
# says what the picture doesn't show
_NOT_SEEN: Final = re.compile(
    r"\b(?:can'?t|cannot|can not|don'?t|do not) (?:\w+ )?(?:see|notice|spot|make out|observe) "
    r"(?!(?:an?|the|any|your) (?:image|picture|photo)|images|pictures|photos|people)",
    re.IGNORECASE,
)
_IMPERSONAL: Final = re.compile(
    r"\b(?:(?:difficult|hard) to (?:describe|identify)"
    r"|(?:not possible|impossible|not appropriate|inappropriate|not feasible) (?:for me )?to "
    r"(?:\w+ly )?(?:describe|identify|provide|comment|determine|analy[sz]e|discern|give|tell|guess"
    r"|speculate|assume|infer|share|make)"
    r"|(?:no image|no picture|no photo)(?:graph)?\b.{0,30}\b(?:provided|attached|uploaded|shared)"
    r"|there is no (?:image|picture|photo|person)"
    r"|(?:image|picture|photo)\b.{0,40}(?:cannot|can't|could not|couldn't) be (?:processed|loaded"
    r"|displayed|opened|viewed|read)"
    r"|(?:image|picture|photo)\b.{0,20}(?:did not|didn't|failed to|not) (?:load|upload|open|come)"
    r"|(?:against|violates?) .{0,30}(?:policy|policies|guidelines|privacy)"
    r"|(?:please|could you|can you) (?:\w+ )?(?:provide|upload|share|send|attach|try|ask))",
    re.IGNORECASE,
)
_OFFER: Final = re.compile(
    r"(?:(?:however|but|instead|still|\w+(?: \w+)?,),? )?"
    r"(?:(?:i (?:can|could|may|will)|i'm|i am) (?:still |also )?(?:happy|glad|help|assist|describe"
    r"|provide|offer|discuss|try|do my best|talk|give|answer)"
    r"|i(?:'d| would) (?:be (?:happy|glad)|like to|love to|need|recommend|suggest))",
    re.IGNORECASE,
)
# before the part of a sentence that describes after all
_TURN: Final = re.compile(
    r": |[,;] (?:but|however|though|although),? (?:(?:i|we) can \w+(?: that)? )?"
    r"|, (?:i|we) can (?:say|see|tell you|note|confirm|observe)(?: that)? ",
    re.IGNORECASE,
)
_LEAST: Final = 6  # words that an answer has beside a refusal, if it describes anything


def without_talk(text: str) -> tuple[str, bool]:
    """Returns what an answer says about the picture, and whether it also spoke to the user: an
    opening, an announcement, an apology, an offer.
    """
    rest = _without_opening(text)
    parts = sentences(rest)
    described = [about for part in parts if (about := _about_picture(part))]
    if described != parts:
        rest = " ".join(described)
    rest = _without_opening(rest)
    if rest == text:
        return text, False
    return rest[:1].upper() + rest[1:], True


def is_refusal(text: str) -> bool:
    """True if an answer declines, and describes nothing besides."""
    parts = sentences(text)
    if not any(_declines(part) for part in parts):
        return False
    described = " ".join(
        _tail(part) if _IMPERSONAL.search(_plain(part)) else _about_picture(part) for part in parts
    )
    return len(described.split()) < _LEAST


def _without_opening(text: str) -> str:
    before = ""
    while text != before:
        before = text
        for pattern in (_OPENING, _ANNOUNCEMENT, _LABEL, _ASIDE):
            if match := pattern.match(text):
                text = text[match.end() :].lstrip()
    return text


def _about_picture(sentence: str) -> str:
    """Returns the part of a sentence that is about the picture; "" if it speaks to the user."""
    plain = _plain(sentence)
    if aside := _ASIDE.match(plain):
        return sentence[aside.end() :]
    if _declines_in_person(plain):
        return _tail(sentence)
    talks = any(pattern.match(plain) for pattern in (_PLAN, _CLOSING, _OFFER))
    return "" if talks else sentence


def _tail(sentence: str) -> str:
    """Returns what a sentence that declines says about the picture at its end; "" if nothing."""
    for match in reversed([*_TURN.finditer(_plain(sentence))]):
        tail = sentence[match.end() :]
        if len(tail.split()) >= _LEAST and not _FIRST_PERSON.search(_plain(tail)):
            return tail
    return ""


def _declines(sentence: str) -> bool:
    plain = _plain(sentence)
    return _declines_in_person(plain) or _IMPERSONAL.search(plain) is not None


def _declines_in_person(plain: str) -> bool:
    plain = _NOT_SEEN.sub("", plain)
    apology = re.match(r"(?:(?:i'm|i am) (?:very |so )?)?sorry\b|unfortunately, i\b", plain, re.I)
    return bool(apology or (_FIRST_PERSON.search(plain) and _INABILITY.search(plain)))


def _plain(sentence: str) -> str:
    """Returns the sentence without quotations and with plain apostrophes; its length stays."""
    return unquoted(sentence).replace("’", "'")
