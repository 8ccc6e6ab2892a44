"""Reads from a caption what it claims of glasses, hat, hair, mouth, ears and pose, and on request
what it claims of traits that aren't measured, such as the colour of the eyes.

The grammar knows few forms and leaves out what may mean something else: degrees ("partly hidden"),
other people, things that are held, and the subject's own left and right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from stages.answers.sentences import sentences, unquoted


class Claim(NamedTuple):
    """A claim. topic: glasses, hat, hair_color, bald, mouth, teeth, smile, ears, turned, gaze or
    pitched; of unmeasured ones a key of QUALITIES or PRESENT. value: what the caption says of it,
    see `claims_of`. text: the words.
    """

    topic: str
    value: str
    text: str


_SEVERAL: Final = re.compile(
    r"\b(?:two|three|four|five|several|both (?:men|women|people|of them)|couple|group|others?"
    r"|another|crowd|family|(?:wo)?men|children|the (?:one|person|man|woman) (?:on|next|behind))\b"
    r"(?! (?:eyes|ears|front teeth|teeth|small|tiny|large|moles|hoops|braids|pigtails))",
    re.IGNORECASE,
)
_CLAUSE: Final = re.compile(
    r"[,;:.!?]|\band\b|\bbut\b|\bwhile\b|\bwith\b(?! no\b)|\bas\b|[-–—]{2,}"
)
# "no hat, scarf or glasses" denies all three
_DENIED_LIST: Final = re.compile(r"\b(?:no|without|nor) [\w ]+(?:, [\w ]+)*,? or [\w ]+", re.I)
_NO: Final = re.compile(
    r"\b(?:no|not|without|never|none|neither|nor|lacks?|lacking|isn't|aren't|doesn't|don't"
    r"|absence of|free of|cannot|can't)\b",
    re.IGNORECASE,
)
_VAGUE: Final = re.compile(
    r"\b(?:part(?:ly|ially)?|barely|slightly|mostly|somewhat|almost|nearly|half|may|might|perhaps"
    r"|possibly|seems?|could|hint|faint|slight|subtle|would|if|or|like)\b",
    re.IGNORECASE,
)
_OWN_SIDE: Final = re.compile(r"\b(?:his|her|their|its|own) (?:left|right)\b", re.IGNORECASE)

_GLASSES: Final = re.compile(r"\b(?:(?:eye|sun)?glasses|spectacles|goggles)\b", re.IGNORECASE)
_NOT_WORN: Final = re.compile(
    r"\b(?:holds?|holding|hand|hands|table|of (?:wine|water|beer|champagne)|pushed|hanging|forehead"
    r"|top of|on (?:the|his|her|their) head|wine|case|shop|store|logo|tattoo)\b",
    re.IGNORECASE,
)
_HAT: Final = re.compile(
    r"\b(?:hat|cap|beanie|beret|fedora|helmet|bonnet|snapback|sombrero|headwear)\b", re.IGNORECASE
)
_BALD: Final = re.compile(
    r"\b(?:bald(?!ing)|shaved head|(?:head is|is) (?:clean-)?shaved|hairless head"
    r"|no hair on (?:his|her|the|their) head)\b",
    re.IGNORECASE,
)
_COLORS: Final = {
    "black": "black|jet-black|raven",
    "brown": "brown|brunette|chestnut",
    "blond": "blond|blonde|golden|platinum",
    "grey": "grey|gray|silver|salt-and-pepper|white",
    "red": "red|ginger|auburn|copper",
}
_COLOR_OF: Final = {word: name for name, words in _COLORS.items() for word in words.split("|")}
_COLOR: Final = rf"(?:{'|'.join(_COLOR_OF)})"
_SHAPE: Final = (
    r"(?:(?:very |fairly )?(?:long|short|medium-length|shoulder-length|wavy|curly|straight|thick"
    r"|thin|fine|sleek|shiny|coily|cropped|braided|tousled|flowing|loose|natural),? (?:and )?)*"
)
_HAIR: Final = re.compile(
    rf"\b({_COLOR})(?:-haired\b|,? {_SHAPE}hair\b(?! (?:tie|band|clip|net|pin|accessor)))"
    rf"|(?<!facial )\bhair (?:is|appears) {_SHAPE}(?:dark |light |very )?({_COLOR})\b",
    re.IGNORECASE,
)
_MOUTH: Final = re.compile(r"\b(?:mouth|lips)\b", re.IGNORECASE)
_OPEN: Final = re.compile(r"\b(?:open|agape|wide open)\b|\bopen-mouthed\b", re.IGNORECASE)
_CLOSED: Final = re.compile(r"\b(?:closed|shut|pressed together)\b", re.IGNORECASE)
_SMILES: Final = re.compile(
    r"\b(?:smil(?:es|ing|e)|grin(?:s|ning)?|laugh(?:s|ing)?|beam(?:s|ing))\b", re.IGNORECASE
)
_SERIOUS: Final = re.compile(
    r"\b(?:serious|stern|neutral|sad|solemn) (?:facial )?(?:expression|look|face)\b"
    r"|\bexpression is (?:serious|stern|neutral|sad|solemn)\b|\b(?:frown|scowl)(?:s|ing)\b",
    re.IGNORECASE,
)
_TEETH: Final = re.compile(
    r"\bteeth (?:are |is )?(?:not )?(?:\w+ly )?(?:visible|showing|shown|exposed)\b|\btoothy\b"
    r"|\b(?:(?:show|reveal|display)(?:s|ing)?|bar(?:es|ing)) (?:[\w-]+ ){0,5}teeth\b"
    r"|\bteeth show\b",
    re.IGNORECASE,
)
_EARS: Final = re.compile(r"\bears?\b", re.IGNORECASE)
_SHOWN: Final = re.compile(
    r"\b(?:visible|shows?|exposed|uncovered|seen|stick out|protrude|showing)\b", re.IGNORECASE
)
_HIDDEN: Final = re.compile(
    r"\b(?:hidden|covered|concealed|obscured|invisible|out of (?:view|sight)|tucked under)\b",
    re.IGNORECASE,
)
_HEAD_TURNED: Final = re.compile(
    r"\b(?:head|face|nose|she|he|person|man|woman|body)\b[\w ,']*?"
    r"\b(?:turned|turns|facing|faces|rotated|points|pointing|profile)\b[\w ]*?\b(left|right)\b"
    r"|\b(?:turned|facing)\b[\w ]*?\bto (?:the )?(left|right)\b",
    re.IGNORECASE,
)
_LOOKS: Final = re.compile(
    r"\b(?:look(?:s|ing)|gaz(?:e|es|ing)|glanc(?:es|ing)|star(?:es|ing))\b[\w ]*?\b"
    r"(left|right|up|down)(?:wards?)?\b(?! (?:ear|eye|side of|hand|cheek|shoulder))",
    re.IGNORECASE,
)
_FRONT: Final = re.compile(
    r"\b(?:face|head|nose|person|man|woman|she|he)\b[\w ]*?\b(?:seen from the front"
    r"|(?:faces|facing|turned to|points to) the (?:camera|viewer)|points straight ahead"
    r"|seen head on)\b|\bfrontal (?:view|portrait)\b",
    re.IGNORECASE,
)
_PROFILE: Final = re.compile(
    r"\bin profile\b|\b(?:seen|shown) from the side\b|\bside (?:view|profile)\b|\bturned fully\b",
    re.I,
)
_HEAD_PITCHED: Final = re.compile(
    r"\b(?:head|face|chin)\b[\w ,]*?\b(raised|lowered|bowed|lifted"
    r"|tilted (?:up|down|back)(?:wards?)?)\b",
    re.IGNORECASE,
)
# Unmeasured topics with several values: (noun, value → words).
QUALITIES: Final[dict[str, tuple[str, dict[str, str]]]] = {
    "eye_color": (
        "eyes",
        {
            "blue": "blue",
            "green": "green",
            "brown": "brown|dark|black|amber",
            "hazel": "hazel",
            "grey": "grey|gray",
        },
    ),
    "eyes": ("eyes", {"open": "open", "closed": "closed|shut"}),
    "hair_length": (
        "hair",
        {"long": "long|shoulder-length|waist-length", "short": "short|cropped|buzzed"},
    ),
    "skin": (
        "(?:skin|complexion)",
        {"light": "fair|pale|light|white", "dark": "dark|black|brown|deep", "olive": "olive|tan"},
    ),
    "face_shape": (
        "face",
        {
            "round": "round",
            "oval": "oval",
            "square": "square",
            "heart": "heart-shaped",
            "long": "long",
        },
    ),
    "nose": ("nose", {"large": "large|big|broad|wide", "small": "small|tiny|narrow|slender|thin"}),
    "lips": ("lips", {"full": "full|thick|plump", "thin": "thin|narrow"}),
}
# Unmeasured topics that are present (yes) or not (no) → words.
PRESENT: Final = {
    "beard": r"beard|bearded|goatee|stubble|facial hair",
    "mustache": r"mo?ustache",
    "freckles": r"freckles|freckled",
    "wrinkles": r"wrinkles|wrinkled|crow's[- ]feet",
    "earrings": r"earrings?",
    "makeup": r"make-?up|lipstick|mascara|eyeliner|eye ?shadow",
    "necklace": r"necklace",
    "laugh": r"laugh(?:s|ing|ter)?",
    "mask": r"(?:face |surgical )?mask",
    "scarf": r"scarf",
}
_SHAVEN: Final = re.compile(r"\b(?:clean-shaven|beardless)\b", re.IGNORECASE)
# characters of a sentence that is read; the time for one grows faster than its length
_LONGEST: Final = 600
_UP: Final = ("raised", "lifted", "tilted up", "tilted back")


def claims_of(text: str, *, unmeasured: bool = False) -> list[Claim]:
    """Returns the claims of an English caption, in order; none if it speaks of several people.

    unmeasured: also those that no label map or measure can confirm. Values: yes or no (glasses,
    hat, bald, teeth, smile, PRESENT); a key of _COLORS; open or closed (mouth); visible, both, one
    or hidden (ears); left, right, front or profile, as the viewer sees it (turned, gaze); up or
    down (pitched, gaze); those of QUALITIES.
    """
    plain = unquoted(text.replace("’", "'"))
    if _SEVERAL.search(plain):
        return []
    claims: dict[Claim, None] = {}
    for sentence in sentences(plain):
        if len(sentence) > _LONGEST:
            continue
        claims |= dict.fromkeys([*_hair_claims(sentence), *_pose_claims(sentence)])
        for clause, denied in _clauses(sentence):
            for reader in (*_READERS, *(_UNMEASURED if unmeasured else ())):
                claims |= dict.fromkeys(reader(clause, denied))
    return list(claims)


def conflict(one: Claim, other: Claim) -> bool:
    """True if two claims can't both hold of one picture: "blue eyes" and "brown eyes"."""
    first, second = one[:2], other[:2]
    if one.topic == other.topic:
        return one.value != other.value and {one.value, other.value} not in _BOTH_HOLD
    return (first, second) in _EXCLUDE or (second, first) in _EXCLUDE


def _clauses(sentence: str) -> Iterator[tuple[str, bool]]:
    """Yields the clauses of a sentence, and whether each is a denial."""
    joined = _DENIED_LIST.sub(lambda match: re.sub(", (?!or)", " or no ", match[0]), sentence)
    for clause in _CLAUSE.split(joined):
        yield clause.strip(), _NO.search(clause) is not None


def _denies(clause: str, match: re.Match[str]) -> bool:
    """True if a clause denies what it names: "no hat", "a hat isn't visible", and not "glasses with
    no frame".
    """
    after = re.match(r" (?:is|are) (?:not|never)\b| (?:isn't|aren't)\b", clause[match.end() :])
    return bool(_NO.search(clause[: match.start()]) or after)


def _worn(topic: str, pattern: re.Pattern[str]) -> Callable[[str, bool], Iterator[Claim]]:
    def read(clause: str, denied: bool) -> Iterator[Claim]:
        match = pattern.search(clause)
        if not match or _NOT_WORN.search(clause):
            return
        denied = denied and _denies(clause, match)
        if denied or not _VAGUE.search(clause):
            yield Claim(topic, "no" if denied else "yes", clause)

    return read


def _hair_claims(sentence: str) -> Iterator[Claim]:
    for match in _HAIR.finditer(sentence):
        before = sentence[max(0, match.start() - 25) : match.start()]
        if not _NO.search(before):
            yield Claim("hair_color", _COLOR_OF[(match[1] or match[2]).lower()], match[0])


def _bald(clause: str, denied: bool) -> Iterator[Claim]:
    if _BALD.search(clause) and (not denied or "no hair" in clause) and not _VAGUE.search(clause):
        yield Claim("bald", "yes", clause)


def _mouth(clause: str, denied: bool) -> Iterator[Claim]:
    if _MOUTH.search(clause) and not denied and not _VAGUE.search(clause):
        if _OPEN.search(clause):
            yield Claim("mouth", "open", clause)
        elif _CLOSED.search(clause):
            yield Claim("mouth", "closed", clause)
    if _TEETH.search(clause):
        yield Claim("teeth", "no" if denied else "yes", clause)


def _smile(clause: str, denied: bool) -> Iterator[Claim]:
    match = _SMILES.search(clause)
    denied = denied and match is not None and _denies(clause, match)
    if match and (denied or not _VAGUE.search(clause)):
        yield Claim("smile", "no" if denied else "yes", clause)
    elif not match and _SERIOUS.search(clause) and not _NO.search(clause):
        yield Claim("smile", "no", clause)


def _ears(clause: str, denied: bool) -> Iterator[Claim]:
    if not _EARS.search(clause) or _VAGUE.search(clause):
        return
    one = re.search(r"\b(?:one|left|right) (?:of the )?ears?\b", clause, re.IGNORECASE)
    if _HIDDEN.search(clause) or (denied and _SHOWN.search(clause)):
        if not one and not (denied and _HIDDEN.search(clause)):
            yield Claim("ears", "hidden", clause)
    elif _SHOWN.search(clause) and not denied:
        both = re.search(r"\b(?:both|two)\b", clause, re.IGNORECASE)
        counted = re.search(r"\b(?:one of the ears|(?:only )?one ear)\b", clause, re.IGNORECASE)
        yield Claim("ears", "both" if both else "one" if counted else "visible", clause)


def _quality(topic: str) -> Callable[[str, bool], Iterator[Claim]]:
    noun, values = QUALITIES[topic]
    value_of = {word: value for value, words in values.items() for word in words.split("|")}
    words = "|".join(sorted(value_of, key=len, reverse=True))
    between = rf"(?!(?:{words}|of|in|on|under|around|near|behind|above|his|her|their|the|a)\b)"
    gap = rf"(?:,? {between}[\w-]+){{0,2}}"
    pattern = re.compile(
        rf"(?<![\w-])({words})(?:-\w+)?{gap},? {noun}\b"
        rf"|\b{noun} (?:(?:is|are|appears?) )?(?:[\w-]+ )?({words})\b(?! (?:hair|lashes|circles))",
        re.IGNORECASE,
    )

    def read(clause: str, denied: bool) -> Iterator[Claim]:
        match = None if denied or _VAGUE.search(clause) else pattern.search(clause)
        if match:
            yield Claim(topic, value_of[(match[1] or match[2]).lower()], match[0])

    return read


def _shaven(clause: str, denied: bool) -> Iterator[Claim]:
    if not denied and _SHAVEN.search(clause):
        yield Claim("beard", "no", clause)


def _pose_claims(sentence: str) -> Iterator[Claim]:
    if _NO.search(sentence) or _OWN_SIDE.search(sentence):
        return
    for part in re.split(r"[,;]| and (?=the )", sentence):
        if match := _LOOKS.search(part):
            yield Claim("gaze", match[1].lower(), match[0])
        elif match := _HEAD_TURNED.search(part):
            yield Claim("turned", (match[1] or match[2]).lower(), match[0])
        if match := _FRONT.search(part):
            yield Claim("turned", "front", match[0])
        if match := _PROFILE.search(part):
            yield Claim("turned", "profile", match[0])
    if match := _HEAD_PITCHED.search(sentence):
        yield Claim("pitched", "up" if match[1].lower().startswith(_UP) else "down", match[0])


_READERS: Final = (_worn("glasses", _GLASSES), _worn("hat", _HAT), _bald, _mouth, _smile, _ears)
_UNMEASURED: Final = (
    *(_quality(topic) for topic in QUALITIES),
    *(_worn(topic, re.compile(rf"\b(?:{words})\b", re.I)) for topic, words in PRESENT.items()),
    _shaven,
)
# Values of one topic that can both hold.
_BOTH_HOLD: Final = (
    {"visible", "both"},
    {"visible", "one"},
    {"left", "profile"},
    {"right", "profile"},
    {"left", "up"},
    {"left", "down"},
    {"right", "up"},
    {"right", "down"},
)
# Claims of two topics that can't both hold.
_EXCLUDE: Final = {
    (("mouth", "closed"), ("teeth", "yes")),
    (("mouth", "closed"), ("laugh", "yes")),
    (("smile", "no"), ("laugh", "yes")),
    *((("bald", "yes"), ("hair_color", color)) for color in _COLORS),
    *((("bald", "yes"), ("hair_length", length)) for length in ("long", "short")),
}
