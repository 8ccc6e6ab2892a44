"""Composes captions without a language model, from the measured appearance alone.

Sex, age and ethnicity aren't guessed, and what is too small, ambiguous or unknown isn't mentioned
(see appearance.py). The record's key chooses between phrases of equal meaning, so a caption is the
same in every run.

The face caption names every visible region once, by its word (face, eyes, ears, nose, mouth), in
lower case and in a clause of its own, because the trainer finds regions by these words. "ears" and
"eyes" stay plural even if only one is visible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import cv2
import numpy as np

from configs.captions import AttributesConfig
from stages.backends.appearance import Appearance, measure_appearance
from stages.backends.protocols import Answer
from stages.codec import decode_jpeg, decode_labels
from stages.record import Record, scaled

if TYPE_CHECKING:
    from stages.backends.weights import Weights

# Images are reduced by a whole factor to a short side of at least this many pixels before they are
# measured: lengths are in units of the face, and captions need no finer detail.
_SHORT_SIDE: Final = 256


class Attributes:
    """The captioner for machines without a large GPU; every word of its captions can be checked."""

    independent = True

    def __init__(self, config: AttributesConfig, weights: Weights | None = None) -> None:
        """No settings, no weights."""

    @staticmethod
    def digests(config: AttributesConfig) -> Mapping[str, str]:
        """No weights: the version of the rules. It rises whenever a caption changes."""
        return {"rules": "2"}

    @staticmethod
    def window(config: AttributesConfig, batch_size: int) -> int:
        return batch_size

    def caption(
        self, records: Sequence[Record], batch_size: int = 1
    ) -> list[tuple[Answer, Answer]]:
        """(coarse, fine) of each record; fine is "" where no region of the face is visible."""
        answers = []
        for record in records:
            appearance, key = appearance_of(record), record.key
            coarse, fine = compose_caption(appearance, key), compose_face_caption(appearance, key)
            answers.append((Answer(coarse, "stop"), Answer(fine, "stop")))
        return answers


def appearance_of(record: Record) -> Appearance:
    """Returns the appearance of a record's main face. Raises ValueError if it has none."""
    image, labels, face = decode_jpeg(record.image), decode_labels(record.parsing), record.main_face
    step = max(1, min(labels.shape) // _SHORT_SIDE)
    if step > 1:
        labels = np.ascontiguousarray(labels[::step, ::step])
        size = (labels.shape[1], labels.shape[0])
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
        face = scaled(face, 1 / step)
    return measure_appearance(image, labels, face)


class _Phrases:
    """Chooses between phrases of equal meaning, by successive digits of the key (a hash)."""

    def __init__(self, key: str) -> None:
        self._digits = int(key, 16)

    def pick(self, *phrases: str) -> str:
        self._digits, index = divmod(self._digits, len(phrases))
        return phrases[index]


def compose_caption(appearance: Appearance, key: str) -> str:
    """Returns the caption: a sentence that is complete by itself, and a second one about pose and
    background if these are known. key: the record's, hex digits.
    """
    phrases = _Phrases(key)
    kind = "close-up portrait" if appearance.close_up else "portrait"
    opening = phrases.pick(f"A {kind} of a person", f"A {kind} showing a person")
    features = [
        part for part in (_hair(appearance), "a fringe" if appearance.fringe else "") if part
    ]
    subject = opening + (f" with {_listed(features)}" if features else "")
    worn = _worn(appearance)
    clauses = [subject, f"wearing {_listed(worn)}" if worn else "", _expression(appearance)]
    first = ", ".join(clause for clause in clauses if clause) + "."
    pose = _pose(appearance)
    backdrop = f"the background is mostly {appearance.backdrop}" if appearance.backdrop else ""
    second = _listed([part for part in (f"the head is {pose}" if pose else "", backdrop) if part])
    return f"{first} {second[0].upper()}{second[1:]}." if second else first


def compose_face_caption(appearance: Appearance, key: str) -> str:
    """Returns the face caption: a sentence with a clause for each visible region, "" if none is.

    key: the record's, hex digits.
    """
    phrases = _Phrases(key[::-1])
    clause_of = {"face": _face, "eyes": _eyes, "ears": _ears, "nose": _nose, "mouth": _mouth}
    clauses = [
        clause(appearance, phrases)
        for word, clause in clause_of.items()
        if word in appearance.regions
    ]
    if not clauses:
        return ""
    text = ", ".join(clauses[:-1]) + (", and " if len(clauses) > 1 else "") + clauses[-1]
    return f"{text[0].upper()}{text[1:]}."


def _hair(appearance: Appearance) -> str:
    length = "long" if appearance.hair_long else ""
    adjectives = [word for word in (length, appearance.hair_color) if word]
    return " ".join([*adjectives, "hair"]) if adjectives else ""


def _worn(appearance: Appearance) -> list[str]:
    worn = []
    if appearance.glasses:
        worn.append("dark glasses" if appearance.dark_glasses else "glasses")
    if appearance.hat:
        color = appearance.hat_color
        hat = _with_article(f"{color} hat")
        worn.append(f"{color} headwear".strip() if appearance.headwear else hat)
    if appearance.earrings:
        worn.append("earrings" if appearance.earrings > 1 else "an earring")
    if appearance.necklace:
        worn.append("a necklace")
    if appearance.cloth_color:
        worn.append(_with_article(f"{appearance.cloth_color} top"))
    return worn


def _expression(appearance: Appearance) -> str:
    if not appearance.mouth:
        return ""
    if not appearance.smile:
        return f"with the mouth {appearance.mouth}"
    if appearance.teeth:
        return "smiling and showing teeth"
    if appearance.mouth in ("closed", "slightly open"):
        return f"smiling with the mouth {appearance.mouth}"
    return "smiling with an open mouth"


def _pose(appearance: Appearance) -> str:
    """Returns the words that follow "the head is"; "" if the head is straight."""
    side = "left" if appearance.turned < 0 else "right"
    turned = (
        "",
        f"turned slightly to the {side}",
        f"turned to the {side}",
        f"turned fully to the {side}",
    )
    tilt_side = "left" if appearance.tilted < 0 else "right"
    tilted = f"tilted to the {tilt_side}" if appearance.tilted else ""
    pitched = {-1: "lowered", 0: "", 1: "raised"}[appearance.pitched]
    return _listed([part for part in (turned[abs(appearance.turned)], tilted, pitched) if part])


def _face(appearance: Appearance, phrases: _Phrases) -> str:
    side = "left" if appearance.turned < 0 else "right"
    if appearance.turned == 0:
        view = phrases.pick("the face is seen from the front", "the face is turned to the camera")
    elif abs(appearance.turned) < 3:
        degree = "slightly " if abs(appearance.turned) == 1 else ""
        view = f"the face is turned {degree}to the {side}"
    else:
        view = phrases.pick(
            f"the face is in profile to the {side}", f"the face is seen from the side facing {side}"
        )
    if appearance.glasses and "eyes" not in appearance.regions:
        return f"{view} behind {'dark ' if appearance.dark_glasses else ''}glasses"
    if appearance.fringe:
        return f"{view} under a fringe"
    return f"{view} and framed by long hair" if appearance.hair_long else view


def _eyes(appearance: Appearance, phrases: _Phrases) -> str:
    # In a frontal face both eyes are visible: if one is missing, the parser didn't find it.
    if appearance.eyes == 1 and abs(appearance.turned) >= 2:
        return phrases.pick("one of the eyes is visible", "one of the eyes shows")
    state = "narrowed" if appearance.narrowed else "visible"
    brows = glasses = ""
    if appearance.dark_brows:
        brows = phrases.pick(" under dark brows", " below dark brows", "")
    if appearance.glasses:
        glasses = " behind glasses"
    subject = "the eyes"
    if appearance.eyes == 2:
        subject = phrases.pick("both eyes", "the eyes", "the two eyes")
    return f"{subject} are {state}{glasses or brows}"


def _ears(appearance: Appearance, phrases: _Phrases) -> str:
    if appearance.ears == 2:
        clause = phrases.pick("both ears are visible", "the two ears show")
    elif appearance.ears == 1:
        clause = phrases.pick("one of the ears is visible", "one of the ears shows")
    else:
        clause = "the ears are barely visible"
    if appearance.earrings:
        clause += " with earrings" if appearance.earrings > 1 else " with an earring"
    return clause


def _nose(appearance: Appearance, phrases: _Phrases) -> str:
    if appearance.turned == 0:
        return phrases.pick(
            "the nose points straight ahead",
            "the nose is seen head on",
            "the nose points to the camera",
        )
    side = "left" if appearance.turned < 0 else "right"
    return phrases.pick(f"the nose points to the {side}", f"the nose faces {side}")


def _mouth(appearance: Appearance, phrases: _Phrases) -> str:
    if not appearance.mouth:
        return "the mouth is visible"
    smile = f" {phrases.pick('in a smile', 'and smiling')}" if appearance.smile else ""
    teeth = " with teeth showing" if appearance.teeth else ""
    return f"the mouth is {appearance.mouth}{smile}{teeth}"


def _listed(parts: Sequence[str]) -> str:
    """Joins as in "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _with_article(noun: str) -> str:
    noun = noun.strip()
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
