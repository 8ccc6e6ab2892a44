"""Description: which parts of a photograph's face caption go into a prompt (corrected mode).

What belongs to the moment of the photograph (expression, pose, light, what is worn) is left out,
and so is what the prompt contradicts. What is a property of the person stays. The noun of a region
always stays, because the region's image is fused into it.

The tables say which units of a clause (`infer.clauses`) are of the moment. What contradicts the
prompt is read by the grammar of claims.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Final

from infer.clauses import (
    CONJUNCTION,
    MODIFIER,
    VERB,
    Part,
    bare_unit,
    clauses_of,
    joined,
    keep_nouns,
    left_out_phrases,
    tidied,
)
from stages.claims.grammar import QUALITIES, Claim, claims_of, conflict

CONTRADICTED: Final = "the prompt says "  # begins the reason of what the prompt contradicts


@dataclass(frozen=True, slots=True)
class Description:
    """What goes into a prompt of a face caption.

    text: with each region's noun that the caption has. left_out: (phrase, reason) of what isn't in
    the text, in the order in which it was left out. A reason is a key of _MOMENT, or CONTRADICTED
    with the words of the prompt that contradict the phrase.
    """

    text: str
    left_out: tuple[tuple[str, str], ...] = ()


def _pattern(words: str) -> re.Pattern[str]:
    """Returns a pattern of words; line breaks and indents don't count."""
    lines = "".join(line.strip() for line in words.splitlines())
    return re.compile(rf"\b(?:{lines})\b", re.IGNORECASE)


_DEGREE: Final = (
    "very|wide|half|partly|partially|barely|slightly|somewhat|almost|nearly|fully|faint|slight"
    "|subtle|softly|gently|tightly|warmly"
)
_FEELING: Final = (
    "serious|stern|neutral|sad|solemn|calm|happy|cheerful|joyful|angry|surprised|thoughtful|relaxed"
    "|confident|focused|determined|playful|pensive|tired"
)
_STATE: Final = (
    "open|closed|shut|half-closed|half-open|parted|narrowed|smiling|grinning|laughing|pursed"
    "|squinting|downcast|crying|winking"
)
# Reason → words of a unit that belongs to the moment.
_MOMENT: Final = {
    "expression": _pattern(
        rf"""{_STATE}|{_FEELING}|(?:smil|laugh|grin)\w*\b(?! lines)|frown\w*|smirk\w*|pout\w*
        |scowl\w*|squint\w*|beaming|expressions?|apart|agape|ajar|pressed|clenched|furrowed|wide-eyed|toothy
        |tears|singing|speaking|talking|shouts?|shouting|curved|crinkled?|in (?:\w+ )?surprise
        |(?:show|reveal|display)(?:s|ing)? (?:[\w-]+ ){{0,5}}teeth
        |teeth (?:are )?(?:show|showing|visible|exposed)|(?<!-)set$|twisted$"""
    ),
    "gaze": _pattern(
        r"""gaz\w+|glanc\w+|star(?:es|ing)|eye contact|directed at|lowered
        |look(?:s|ing)? (?:\w+ly |straight |off |back |over )?
        (?:at|down|up|left|right|away|to|into)"""
    ),
    "pose": _pattern(
        r"""turned|tilted|facing|faces (?:left|right|the)|in profile|angled|raised|bowed|lifted
        |leaning|thrown back|head on|straight ahead|frontal
        |seen from the (?:front|side)|points? (?:straight|to|towards)"""
    ),
    "view": _pattern(
        r"""visible|hidden|obscured|concealed|shows?$|(?:can't|cannot) be seen|can be seen
        |covered(?! (?:with|in) (?:\w+ )?freckles)|tucked|^behind|out of view|close-up|stands? out
        |one of (?:the|his|her|their) e(?:ye|ar)s|blurred|in focus|part(?:ly|ially) in"""
    ),
    "light": _pattern(
        r"""lit|lighting|lights|sunlight|daylight|backlit|illuminat\w+|in (?:the )?shadow|shadows
        |shadowed|(?:in|against) the (?:sun|shade|light)|(?:soft|warm|bright|natural) light
        |glare|tint"""
    ),
    "worn": _pattern(
        r"""(?:eye|sun)?glasses|spectacles|goggles|monocle|frames|hat|cap|beanie|beret|fedora|helmet
        |bonnet|headwear|headband|headscarf|bandana|turban|hijab|scarf|hood|hoodie|veil|mask|crown
        |wig|earrings?|hoops?|studs?|necklace|chain|jewel\w+|pearls?|pierced|piercings?(?= on|$)
        |plug|painted|(?:silver|gold|golden|nose|lip|ear) rings?|make-?up|lipstick|mascara
        |eyeliner|eye ?shadow|kohl\S*|blush|wears?|wearing|dressed|shirt|(?<!on )top(?! of)|jacket
        |pacifier"""
    ),
}
# Reason → words that can be cut out of a unit that is about something else.
_CUT: Final = (
    ("view", re.compile(r"\bone of (?=(?:the|his|her|their) e(?:yes|ars)\b)", re.IGNORECASE)),
    (
        "expression",
        re.compile(
            r" ?\b(?:in|with|into|and) (?:a|an) (?:(?!(?:and|with|an?|hair|beard|face|ears?|eyes?"
            r"|nose|mouth|lips) )[\w-]+,? ){0,3}?"
            r"(?:smile|grin|smirk|frown|pout|expression|laugh|(?:neutral|firm) line)\b",
            re.IGNORECASE,
        ),
    ),
    (
        "expression",
        re.compile(
            rf"\b(?:(?:{_DEGREE})[ -])?(?:{_STATE}|{_FEELING}) "
            r"(?=(?:(?!and|with|that|in|of|is|are)[\w-]+ )?(?:eyes?|mouth|lips|face)\b)",
            re.IGNORECASE,
        ),
    ),
)
# Words that the grammar of claims takes for vague, though "slightly open" contradicts "closed".
_VAGUE: Final = re.compile(
    r"\b(?:slightly|slight|faint|subtle|partly|partially|somewhat|half|mostly) ", re.IGNORECASE
)
# Topics whose value stands before a noun → the noun.
_NOUNS: Final = {"hair_color": "hair"} | {topic: noun for topic, (noun, _) in QUALITIES.items()}
# What follows a unit that is left out, and says nothing without it.
_FOLLOWS: Final = re.compile(r"(?:into|against|behind|as|from)\b", re.IGNORECASE)
_PERSON: Final = _pattern(
    r"""hair|fringe|bangs|braids|curls|beard|goatee|stubble|mo?ustache|freckles|dimples|skin|scars?
    |complexion|moles?|wrinkles|lines|jaw|jawline|cheekbones|cheeks?|chin|forehead|brows|eyebrows
    |lashes|eyelashes|tattoos?|tooth|teeth|face|ears?|eyes?|nose|mouth|lips"""
)


def describe(
    face_caption: str, prompt: str, *, override: str | None = None, moment: bool = False
) -> Description:
    """Returns what goes into a prompt of a photograph's face caption, in the caption's order.

    override: the user's own description, used as it is in place of the caption. moment: include the
    expression, pose, light and things worn of the photograph. Describing the result again changes
    nothing.
    """
    if override is not None:
        return Description(text=override)
    reader = _Reader(tuple(_statements(prompt)), moment)
    text, left_out = face_caption, list[tuple[str, str]]()
    while (step := reader.shortened(text)).left_out:  # each step has fewer words
        text = step.text
        left_out.extend(step.left_out)
    return Description(text=text, left_out=tuple(left_out))


@dataclass(frozen=True, slots=True)
class _Reader:
    """Leaves out what belongs to the moment or contradicts the prompt.

    claims: the prompt's. moment: whether the moment stays.
    """

    claims: tuple[Claim, ...]
    moment: bool

    def shortened(self, text: str) -> Description:
        """Returns a text without some of its phrases; the same text if all stay."""
        cut = self._without_words(text)
        return cut if cut.left_out else self._without_units(text)

    def _without_words(self, text: str) -> Description:
        """Cuts out words, such as a state or a colour in front of a region's noun."""
        spans = [
            (match.start(), match.end(), reason)
            for reason, pattern in (() if self.moment else _CUT)
            for match in pattern.finditer(text)
        ]
        for claim in _read(text):
            # "brown" of "brown eyes"; that of "the eyes are brown" is a unit of its own
            noun = _NOUNS.get(claim.topic)
            word = noun and re.match(rf"(?!{noun}\b)[\w-]+,? (?=.*{noun}$)", claim.text, re.I)
            reason = self._contradicted([claim], same_topic=True)
            if word and reason:
                rest = re.escape(claim.text[word.end() :])
                phrase = rf"\b(?:(?:dark|light|bright) )?{re.escape(word[0])}(?={rest})"
                spans.extend((*match.span(), reason) for match in re.finditer(phrase, text))
        rest, left_out, last = "", list[tuple[str, str]](), 0
        for start, end, reason in sorted(spans):
            if start >= last:
                left_out.append((text[start:end].strip(" ,"), reason))
                rest, last = rest + text[last:start], end
        return Description(text=tidied(rest + text[last:], text), left_out=tuple(left_out))

    def _without_units(self, text: str) -> Description:
        """Leaves out units; of a region that nothing else names, the bare noun stays."""
        whole = _read(text)
        clauses = clauses_of(text)
        for parts in clauses:
            self._judge(parts, whole)
        keep_nouns(clauses)
        return Description(
            text=tidied(joined(clauses), text),
            left_out=tuple(entry for parts in clauses for entry in left_out_phrases(parts)),
        )

    def _judge(self, parts: Sequence[Part], whole: Sequence[Claim]) -> None:
        """Sets the reasons of a clause's units. whole: the claims of all of the caption."""
        is_verb = [VERB.fullmatch(part.text) is not None for part in parts]
        for index, part in enumerate(parts):
            if not is_verb[index]:
                part.reason = self._reason(parts[:index], part, whole)
        for part in parts[1:]:  # a removed subject's predicates are removed for the same reason
            if not parts[0].reason or CONJUNCTION.match(part.text):
                break
            part.reason = parts[0].reason
        for before, part in pairwise(parts):
            if before.reason and not part.reason and _goes_with(before, part):
                part.reason = before.reason

    def _reason(self, before: Sequence[Part], part: Part, whole: Sequence[Claim]) -> str:
        """Returns why a unit is left out, "" if it stays. before: the units before it."""
        claims = chain.from_iterable(_in_context(claim, whole) for claim in _added(before, part))
        if reason := self._contradicted(claims):
            return reason
        reasons = () if self.moment else _MOMENT.items()
        return next((reason for reason, words in reasons if words.search(part.text)), "")

    def _contradicted(self, claims: Iterable[Claim], *, same_topic: bool = False) -> str:
        """Returns what in the prompt contradicts one of the claims, "" if nothing does."""
        for claim in claims:
            for wanted in self.claims:
                if conflict(claim, wanted) and (claim.topic == wanted.topic or not same_topic):
                    return f"{CONTRADICTED}{wanted.text!r}"
        return ""


def _read(text: str) -> list[Claim]:
    return claims_of(_VAGUE.sub("", text), unmeasured=True)


def _goes_with(before: Part, part: Part) -> bool:
    """True if a unit describes or continues the one before it, which is left out."""
    if before.reason == "worn":
        return not (_PERSON.search(part.text) or VERB.match(part.text))
    return _FOLLOWS.match(part.text) is not None


def _statements(text: str) -> Iterator[Claim]:
    """Yields the claims of a text, also those that have their noun in another clause."""
    claims = _read(text)
    yield from claims
    topics = {claim.topic for claim in claims}
    for parts in clauses_of(text):
        for index, part in enumerate(parts):
            yield from (c for c in _added(parts[:index], part) if c.topic not in topics)


def _added(before: Sequence[Part], part: Part) -> list[Claim]:
    """Returns what a unit claims of its subject: "the eyes", "are" before "and blue"."""
    if not before:
        return _read(part.text)
    bare = bare_unit(part.text)
    verb = bare_unit(next((p.text for p in reversed(before) if VERB.fullmatch(p.text)), ""))
    subject = before[0].text
    context = f"{subject} {verb}" if verb and not MODIFIER.match(bare) else subject
    own = _read(bare)
    others = {claim[:2] for claim in (*_read(subject), *own)}
    added = [claim for claim in _read(f"{context} {bare}") if claim[:2] not in others]
    return [*own, *added]


def _in_context(claim: Claim, whole: Sequence[Claim]) -> list[Claim]:
    """Returns what the whole text claims instead: "hat" is denied in "no glasses, hat or beard"."""
    same_topic = [other for other in whole if other.topic == claim.topic]
    agrees = not same_topic or any(other.value == claim.value for other in same_topic)
    return [claim] if agrees else same_topic
