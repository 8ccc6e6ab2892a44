"""Notices: sentences that say what was done with a prompt and with a photograph of several people.

They are functions of what other modules return; who shows them decides how.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from configs.errors import ConfigError
from infer.description import CONTRADICTED, Description
from model.spec import TOKEN_LIMIT
from model.tokens import TextTokens
from stages.record import Face
from stages.regions import REGION_WORDS, word_of

# Reason why a region has no slot (`TextTokens.dropped`) → what to say of such regions.
_UNUSED: Final = {
    "word_not_in_caption": "not named in the description of the face. Name {} in face_caption.",
    "caption_too_long": "named too late in a long description. Give a shorter face_caption.",
    "mark_cut_off": f"named behind the {TOKEN_LIMIT} tokens that are read. Shorten the prompt.",
}
_ORDINALS: Final = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


def prompt_notices(tokens: TextTokens, description: Description | None = None) -> list[str]:
    """Returns what a user should know of a prompt; empty if all of it and all regions are used.

    description: of the photograph; what was left out because it belongs to the moment isn't said.
    """
    notices = []
    if tokens.cut:
        count = len(tokens.cut.split())
        last = f"{count} words have" if count > 1 else "word has"
        notices.append(
            f"The prompt is too long for the {TOKEN_LIMIT} tokens that are read with the "
            f"description of the face. Its last {last} no effect: {tokens.cut!r}. Shorten it."
        )
    for reason, advice in _UNUSED.items():
        words = {word_of(region) for region, why in tokens.dropped if why == reason}
        if words:
            names = _listed(words)
            notices.append(f"Not used of the photograph: {names}, {advice.format(names)}")
    present = {*tokens.regions, *(region for region, _ in tokens.dropped)}
    absent = set(REGION_WORDS) - {word_of(region) for region in present}
    if absent:
        notices.append(f"Not in the photograph: {_listed(absent)}. Only the text describes that.")
    for phrase, reason in description.left_out if description else ():
        if reason.startswith(CONTRADICTED):
            notices.append(f"Left out of the description of the face: {phrase!r}, since {reason}.")
    return notices


def face_notice(faces: Sequence[Face], taken: int) -> str:
    """Returns which of several faces was taken, and how to take another; "" for fewer than two.

    faces: those of a photograph's record, in its order. taken: index of the one that was taken.
    """
    if len(faces) < 2:
        return ""
    number = _from_left(faces).index(taken) + 1
    ordinal = _ORDINALS[number - 1] if number <= len(_ORDINALS) else f"number {number}"
    largest = max(range(len(faces)), key=lambda index: faces[index].area) == taken
    which = f"{'the largest, ' if largest else ''}the {ordinal} from the left"
    return (
        f"The photograph shows {len(faces)} faces; {which}, was taken. face=1 to "
        f"face={len(faces)}, counted from the left, chooses another."
    )


def face_index(faces: Sequence[Face], number: int) -> int:
    """Returns the index in `faces` of the number-th face from the left, counted from 1.

    Raises ConfigError if there is no such face.
    """
    if not isinstance(number, int) or not 1 <= number <= len(faces):
        count = {0: "no face", 1: "1 face"}.get(len(faces), f"{len(faces)} faces")
        expected = {0: "give another photograph", 1: "expected 1"}.get(
            len(faces), f"expected 1 (on the left) to {len(faces)}"
        )
        raise ConfigError(f"face={number!r}: the photograph shows {count}; {expected}")
    return _from_left(faces)[number - 1]


def _from_left(faces: Sequence[Face]) -> list[int]:
    """Returns the faces' indices by the middles of their boxes, from left to right."""
    middles = [(face.box[0] + face.box[2], face.box[1] + face.box[3]) for face in faces]
    return sorted(range(len(faces)), key=lambda index: (*middles[index], index))


def _listed(names: Collection[str]) -> str:
    """Joins words of REGION_WORDS, in its order, as in "eyes", "eyes and nose"."""
    words = [word for word in REGION_WORDS if word in names]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
