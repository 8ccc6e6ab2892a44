"""Captions without a language model: sentences composed from what was measured of the picture, and
from nothing else.

No sex, age or ethnicity is guessed, and what is too small, ambiguous or unmeasured isn't said (see
measures.py). Which of several equal phrases is taken depends on the record's key alone, so that a
caption is the same on every run.

The fine description names every visible region once by its word (face, eyes, ears, nose, mouth), in
lower case and each in a clause of its own, since the facial prompt hangs on those words; "ears" and
"eyes" stay plural where one is seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import cv2
import numpy as np

from configs.captions import AttributesConfig
from stages.backends.colors import to_lab
from stages.backends.measures import Measured, measure
from stages.codec import decode_jpeg, decode_labels
from stages.record import Record, scaled

if TYPE_CHECKING:
    from stages.backends.weights import Weights


_SIDE: Final = 256  # short side, pixels, that pictures are brought near to before they are measured


class Attributes:
    """The captioner for machines without a large GPU; every word of its captions can be checked."""

    def __init__(self, config: AttributesConfig, weights: Weights | None = None) -> None:
        """No settings, no weights."""

    @staticmethod
    def digests(config: AttributesConfig) -> Mapping[str, str]:
        """No weights."""
        return {}

    @staticmethod
    def window(config: AttributesConfig, batch_size: int) -> int:
        return batch_size

    def caption(self, records: Sequence[Record], batch_size: int = 1) -> list[tuple[str, str]]:
        """(coarse, fine) of each record; fine is "" where no region of the face is visible."""
        texts = []
        for record in records:
            measured = measure_record(record)
            texts.append((describe(measured, record.key), describe_face(measured, record.key)))
        return texts


def measure_record(record: Record) -> Measured:
    """Measured at about half of 512 pixels: every length is in units of the face, and nothing said
    needs more.
    """
    image, labels, face = decode_jpeg(record.image), decode_labels(record.parsing), record.main_face
    step = max(1, min(labels.shape) // _SIDE)
    if step > 1:
        labels = np.ascontiguousarray(labels[::step, ::step])
        size = (labels.shape[1], labels.shape[0])
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
        face = scaled(face, 1 / step)
    return measure(to_lab(image), labels, face)


class _Phrases:
    """Chooses among equal phrases by successive digits of the key, which is a hash."""

    def __init__(self, key: str) -> None:
        self._digits = int(key, 16)

    def pick(self, *phrases: str) -> str:
        self._digits, index = divmod(self._digits, len(phrases))
        return phrases[index]


def describe(measured: Measured, key: str) -> str:
    """The coarse description: a first sentence that stands by itself, and a second one where there
    is more to say.
    """
    phrases = _Phrases(key)
    kind = "close-up portrait" if measured.close_up else "portrait"
    opening = phrases.pick(f"A {kind} of a person", f"A {kind} showing a person")
    features = [part for part in (_hair(measured), "a fringe" if measured.fringe else "") if part]
    subject = opening + (f" with {_listed(features)}" if features else "")
    worn = _worn(measured)
    clauses = [subject, f"wearing {_listed(worn)}" if worn else "", _expression(measured)]
    first = ", ".join(clause for clause in clauses if clause) + "."
    pose = _pose(measured)
    backdrop = f"the background is mostly {measured.backdrop}" if measured.backdrop else ""
    second = _listed([part for part in (f"the head is {pose}" if pose else "", backdrop) if part])
    return f"{first} {second[0].upper()}{second[1:]}." if second else first


def describe_face(measured: Measured, key: str) -> str:
    """The fine description: a sentence with a clause for each visible region, "" if none is."""
    phrases = _Phrases(key[::-1])
    clause_of = {"face": _face, "eyes": _eyes, "ears": _ears, "nose": _nose, "mouth": _mouth}
    clauses = [
        clause(measured, phrases) for word, clause in clause_of.items() if word in measured.regions
    ]
    if not clauses:
        return ""
    text = ", ".join(clauses[:-1]) + (", and " if len(clauses) > 1 else "") + clauses[-1]
    return f"{text[0].upper()}{text[1:]}."


def _hair(measured: Measured) -> str:
    known = [part for part in ("long" if measured.hair_long else "", measured.hair_color) if part]
    return " ".join([*known, "hair"]) if known else ""


def _worn(measured: Measured) -> list[str]:
    worn = []
    if measured.glasses:
        worn.append("dark glasses" if measured.dark_glasses else "glasses")
    if measured.hat:
        color = measured.hat_color
        worn.append(
            f"{color} headwear".strip() if measured.headwear else _with_article(f"{color} hat")
        )
    if measured.earrings:
        worn.append("earrings" if measured.earrings > 1 else "an earring")
    if measured.necklace:
        worn.append("a necklace")
    if measured.cloth_color:
        worn.append(_with_article(f"{measured.cloth_color} top"))
    return worn


def _expression(measured: Measured) -> str:
    if not measured.mouth:
        return ""
    if measured.smile:
        manner = {
            "closed": "with the mouth closed",
            "slightly open": "with the mouth slightly open",
        }
        return "smiling " + (
            "and showing teeth"
            if measured.teeth
            else manner.get(measured.mouth, "with an open mouth")
        )
    return f"with the mouth {measured.mouth}"


def _pose(measured: Measured) -> str:
    """As it follows "the head is"; "" if there is nothing to say."""
    side = "left" if measured.turned < 0 else "right"
    turned = (
        "",
        f"turned slightly to the {side}",
        f"turned to the {side}",
        f"turned fully to the {side}",
    )
    tilted = (
        f"tilted to the {'left' if measured.tilted < 0 else 'right'}" if measured.tilted else ""
    )
    pitched = {-1: "lowered", 0: "", 1: "raised"}[measured.pitched]
    return _listed([part for part in (turned[abs(measured.turned)], tilted, pitched) if part])


def _face(measured: Measured, phrases: _Phrases) -> str:
    side = "left" if measured.turned < 0 else "right"
    if measured.turned == 0:
        view = phrases.pick("the face is seen from the front", "the face is turned to the camera")
    elif abs(measured.turned) < 3:
        view = f"the face is turned {'slightly ' if abs(measured.turned) == 1 else ''}to the {side}"
    else:
        view = phrases.pick(
            f"the face is in profile to the {side}", f"the face is seen from the side facing {side}"
        )
    if measured.glasses and "eyes" not in measured.regions:
        return f"{view} behind {'dark ' if measured.dark_glasses else ''}glasses"
    if measured.fringe:
        return f"{view} under a fringe"
    return f"{view} and framed by long hair" if measured.hair_long else view


def _eyes(measured: Measured, phrases: _Phrases) -> str:
    # of a frontal face the parser missed the other one
    if measured.eyes == 1 and abs(measured.turned) >= 2:
        return phrases.pick("one of the eyes is visible", "one of the eyes shows")
    state = "narrowed" if measured.narrowed else "visible"
    brows = (
        phrases.pick(" under dark brows", " below dark brows", "") if measured.dark_brows else ""
    )
    glasses = " behind glasses" if measured.glasses else ""
    subject = (
        phrases.pick("both eyes", "the eyes", "the two eyes") if measured.eyes == 2 else "the eyes"
    )
    return f"{subject} are {state}{glasses or brows}"


def _ears(measured: Measured, phrases: _Phrases) -> str:
    if measured.ears == 2:
        clause = phrases.pick("both ears are visible", "the two ears show")
    elif measured.ears == 1:
        clause = phrases.pick("one of the ears is visible", "one of the ears shows")
    else:
        clause = "the ears are barely visible"
    if measured.earrings:
        clause += " with earrings" if measured.earrings > 1 else " with an earring"
    return clause


def _nose(measured: Measured, phrases: _Phrases) -> str:
    if measured.turned == 0:
        return phrases.pick(
            "the nose points straight ahead",
            "the nose is seen head on",
            "the nose points to the camera",
        )
    side = "left" if measured.turned < 0 else "right"
    return phrases.pick(f"the nose points to the {side}", f"the nose faces {side}")


def _mouth(measured: Measured, phrases: _Phrases) -> str:
    if not measured.mouth:
        return "the mouth is visible"
    if measured.smile:
        smile = phrases.pick("in a smile", "and smiling")
        return f"the mouth is {measured.mouth} {smile}" + (
            " with teeth showing" if measured.teeth else ""
        )
    return f"the mouth is {measured.mouth}" + (" with teeth showing" if measured.teeth else "")


def _listed(parts: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _with_article(noun: str) -> str:
    noun = noun.strip()
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
