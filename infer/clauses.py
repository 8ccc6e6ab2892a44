"""Clauses of a caption: splits them into units, and joins what stays of them.

A unit is a subject, a verb, or what begins at a word such as "with" or "and". It stays or is left
out as a whole; of a unit that is left out, the bare noun of a region can stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

from model.prompt import named_regions, region_nouns

_CLAUSE: Final = re.compile(r"[^,.;:!?]+[,.;:!?]*\s*")
# A clause of its own also begins here, without a comma.
_NEW_SUBJECT: Final = re.compile(
    r"\s(?=(?:and|but|while|as) (?:the|his|her|their|its|both|he|she|they|one|two)\b)", re.I
)
VERB: Final = re.compile(
    r"(?:(?:that|which|who|and|but) )?(?:is|are|was|were|has|have|appears?|seems?)"
    r"(?: to be| not| also)*\b",
    re.IGNORECASE,
)
CONJUNCTION: Final = re.compile(r"(?:and|but|while|as)\s+", re.IGNORECASE)
# A unit that begins with these needs no verb before it.
MODIFIER: Final = re.compile(
    r"(?:with|without|behind|under|below|beneath|in|into|against|that|which|who|showing|revealing"
    r"|wearing|looking|giving|painted|looks?|shows?|points?|faces|wears?)\b",
    re.IGNORECASE,
)
_UNIT: Final = re.compile(
    rf"(?<!\bteeth)\s+(?={VERB.pattern}|{CONJUNCTION.pattern}|{MODIFIER.pattern}"
    r"|(?:framed|smiling)\b)",
    re.IGNORECASE,
)
# Words that a unit begins with and never consists of.
_OPENING: Final = re.compile(r"(?:and|but|while|as|that|which|who)", re.IGNORECASE)
# Subjects that say nothing without what follows.
_EMPTY: Final = re.compile(
    r"(?:in the \w+ )?(?:(?:he|she|it|there|this)(?:['’]s)?|they"
    r"|(?:the|a|an|this|his|her|their|its) (?:[\w-]+ )?"
    r"(?:person|subject|individual|man|woman|boy|girl|child|lady|head|chin|gaze|eyebrows|brows))",
    re.IGNORECASE,
)
_ARTICLE: Final = re.compile(r"\b(?:an?|the|his|her|their|its|one|two|both)\b", re.IGNORECASE)
_LINK: Final = re.compile(r"(?:(?:and|but|with)\s+)+", re.IGNORECASE)
_WRONG_ARTICLE: Final = re.compile(r"\b(a(?= [aeiou])|an(?= [^aeiouh\W]))\b", re.IGNORECASE)


@dataclass(slots=True)
class Part:
    """A unit of a clause.

    end: the punctuation behind it. reason: why it is left out; "" if it stays. noun: what stays of
    a unit that is left out, for the sake of a region's noun: "a mouth".
    """

    text: str
    end: str = ""
    reason: str = ""
    noun: str = ""

    @property
    def remaining(self) -> str:
        return self.noun if self.reason else self.text


def clauses_of(text: str) -> list[list[Part]]:
    """Returns the clauses of a text as lists of units; none is empty."""
    return [
        _units(clause)
        for match in _CLAUSE.finditer(text)
        for clause in _NEW_SUBJECT.split(match[0])
    ]


def _units(clause: str) -> list[Part]:
    """Returns the units of a clause, of which the last one has the clause's punctuation."""
    body = clause.rstrip().rstrip(",.;:!?")
    end = clause[len(body) :].strip()
    texts: list[str] = []
    for unit in _UNIT.split(body.strip()):
        if texts and _OPENING.fullmatch(texts[-1]):
            unit = f"{texts.pop()} {unit}"
        verb = VERB.match(unit)
        texts.extend([verb[0], unit[verb.end() :].strip()] if verb else [unit])
    parts = [Part(unit) for unit in texts if unit] or [Part("")]
    parts[-1].end = end
    return parts


def keep_nouns(clauses: Sequence[Sequence[Part]]) -> None:
    """Lets the noun of each region stay that only units name which are left out.

    A verb without a predicate, and a subject whose predicates are all removed, are removed too.
    """
    parts = list(chain.from_iterable(clauses))
    named = set(named_regions(" ".join(part.text for part in parts if not part.reason)))
    for part in parts:
        if part.reason:
            _keep_nouns(part, named)
    for clause in clauses:
        _drop_remnants(clause)


def _drop_remnants(parts: Sequence[Part]) -> None:
    """Removes verbs without a predicate, and subjects whose predicates are all removed."""
    for index, part in enumerate(parts[:-1]):
        following = parts[index + 1]
        after = bare_unit(next((p.text for p in parts[index + 1 :] if p.remaining), ""))
        needless = not after or MODIFIER.match(after) or VERB.match(after)
        if VERB.fullmatch(part.text) and not following.remaining and needless:
            part.reason = part.reason or following.reason
    nothing = len(parts) > 1 and not any(part.remaining for part in parts[1:])
    if nothing and _EMPTY.fullmatch(bare_unit(parts[0].text)):
        parts[0].reason = parts[0].reason or parts[1].reason


def bare_unit(unit: str) -> str:
    """Returns a unit without the conjunction that it begins with."""
    match = CONJUNCTION.match(unit)
    return unit[match.end() :] if match else unit


def _keep_nouns(part: Part, named: set[str]) -> None:
    """Lets the nouns of regions that aren't in `named` stay, and adds the regions to it."""
    missing = sorted(
        (match.start(), match[0], region)
        for region, match in region_nouns(part.text).items()
        if region not in named
    )
    if not missing:
        return
    link = _LINK.match(part.text)
    phrases, last = list[str](), 0
    for start, word, region in missing:
        articles, last = _ARTICLE.findall(part.text[last:start]), start
        phrases.append(f"{articles[-1]} {word}" if articles else word)
        named.add(region)
    noun = (link[0] if link else "") + " and ".join(phrases)
    if len(noun.split()) < len(part.text.split()):
        part.noun = noun
    else:
        part.reason = ""  # it is bare already


def left_out_phrases(parts: Sequence[Part]) -> Iterator[tuple[str, str]]:
    """Yields (phrase, reason) of what is left out of a clause; neighbours are one phrase."""
    phrase, reason = "", ""
    for part in (*parts, Part("")):
        if phrase and part.reason != reason:
            yield phrase, reason
            phrase = ""
        if part.reason:
            phrase, reason = f"{phrase} {part.text}".strip(), part.reason


def joined(clauses: Sequence[Sequence[Part]]) -> str:
    """Joins what stays of the clauses, without an "and" behind what is left out."""
    text, after_gap = "", False
    for parts in clauses:
        for index, part in enumerate(parts):
            remaining = part.remaining
            if after_gap and not part.reason and (index or not text or text[-1] in ".!?"):
                remaining = bare_unit(remaining)
            after_gap = bool(part.reason and not part.noun)
            text = f"{text} {remaining}" if remaining else text
        end = parts[-1].end
        if end and text and text[-1] not in ".!?":
            text = text.rstrip(",;:") + (end if text[-1] not in ",;:" or end[0] in ".!?" else ",")
    return text


def tidied(text: str, before: str) -> str:
    """Returns a shortened text with the articles, end and capitals that it had before."""
    text = _WRONG_ARTICLE.sub(lambda m: m[0] + "n" if len(m[0]) == 1 else m[0][0], text)
    text = re.sub(r"[\s,;:]+(?=[.!?])|\s+(?=[,;:])", "", re.sub(r"\s+", " ", text)).strip()
    last = before.rstrip()[-1:]
    if text[-1:] in ",;:" and last not in ",;:":
        text = text.rstrip(",;: ") + (last if last in ".!?" else "")
    if not re.search(r"\w", text):
        return ""
    if before[:1].isupper():
        text = re.sub(r"(^|[.!?] )([a-z])", lambda match: match[1] + match[2].upper(), text)
    return text
