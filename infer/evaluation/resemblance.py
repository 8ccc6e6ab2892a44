"""Whether portraits resemble the person that they are to show, by two recognisers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.errors import ConfigError
from infer.evaluation.faces import RECOGNISERS, MeasuredPicture, Recogniser
from infer.evaluation.intervals import Interval, interval, mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """The cosines of a portrait: to the right person, the mean of those to all others, and the
    largest of them, with the name of that person.
    """

    right: float
    others: float
    nearest: float
    nearest_person: str

    @property
    def is_first(self) -> bool:
        """Whether the right person is the most alike."""
        return self.right > self.nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class PersonResemblance:
    """Means over a person's portraits. right, others: cosines, of those with a face; None if none
    has one. advantage: right minus others, and first: the share of portraits for which the right
    person is the most alike; in both, a portrait without a face counts as 0.
    """

    person: str
    right: float | None
    others: float | None
    advantage: float
    first: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Resemblance:
    """By one recogniser: the advantage, the share of rank 1 and what chance would give."""

    advantage: Interval
    first: Interval
    chance: float
    people: tuple[PersonResemblance, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PortraitMeasures:
    """has_face, one_face: shares of the portraits with a face, and with exactly one. has_parts:
    share with eyes, nose and mouth in the label map. resemblance: by recogniser.
    """

    portraits: int
    has_face: Interval
    one_face: Interval
    has_parts: Interval
    resemblance: dict[Recogniser, Resemblance]


def likeness(
    portrait: MeasuredPicture,
    person: str,
    references: Mapping[str, MeasuredPicture],
    recogniser: Recogniser = "arcface",
) -> Likeness | None:
    """Compares a portrait with the reference photographs of the right person and of all others.

    Returns None for a portrait without a face. references: by person, at least two. Raises
    ConfigError if the right person, or a face in a reference, is missing.
    """
    names, embeddings = _embeddings(references, recogniser)
    return _likeness(portrait, person, names, embeddings, recogniser)


def measure_portraits(
    portraits: Mapping[str, Sequence[MeasuredPicture]],
    references: Mapping[str, MeasuredPicture],
    *,
    seed: int,
) -> PortraitMeasures:
    """Measures portraits of people.

    portraits: by person, one or more of each. references: the photographs of these people, and
    perhaps of more. Raises ConfigError as `likeness`, and for a person without portraits.
    """
    if not portraits or not all(portraits.values()):
        raise ConfigError("a person has no portraits; give at least one of each person")

    def share(name: str, is_so: Callable[[MeasuredPicture], bool]) -> Interval:
        values = {person: mean([is_so(each) for each in own]) for person, own in portraits.items()}
        return interval(values, seed=seed, name=name)

    return PortraitMeasures(
        portraits=sum(map(len, portraits.values())),
        has_face=share("a face", lambda each: each.face is not None),
        one_face=share("one face", lambda each: each.faces == 1),
        has_parts=share("parts", lambda each: each.face is not None and each.face.has_parts),
        resemblance={
            recogniser: _resemblance(portraits, references, recogniser, seed)
            for recogniser in RECOGNISERS
        },
    )


def _resemblance(
    portraits: Mapping[str, Sequence[MeasuredPicture]],
    references: Mapping[str, MeasuredPicture],
    recogniser: Recogniser,
    seed: int,
) -> Resemblance:
    names, embeddings = _embeddings(references, recogniser)
    people = []
    for name, own in portraits.items():
        all_likeness = [_likeness(each, name, names, embeddings, recogniser) for each in own]
        likenesses = [each for each in all_likeness if each is not None]
        people.append(
            PersonResemblance(
                person=name,
                right=mean([each.right for each in likenesses]),
                others=mean([each.others for each in likenesses]),
                advantage=sum(each.right - each.others for each in likenesses) / len(own),
                first=sum(each.is_first for each in likenesses) / len(own),
            )
        )
    return Resemblance(
        advantage=interval(
            {each.person: each.advantage for each in people},
            seed=seed,
            name=f"{recogniser}, advantage",
        ),
        first=interval(
            {each.person: each.first for each in people}, seed=seed, name=f"{recogniser}, first"
        ),
        chance=1 / len(references),
        people=tuple(people),
    )


def _embeddings(
    references: Mapping[str, MeasuredPicture], recogniser: Recogniser
) -> tuple[list[str], Any]:
    """Returns the people's names and their references' embeddings (N, D)."""
    if len(references) < 2:
        raise ConfigError(
            f"the references are of {len(references)} people, expected at least 2: a portrait is "
            "compared with the right person and with others"
        )
    rows = []
    for name, reference in references.items():
        if reference.face is None:
            raise ConfigError(f"no face in the reference of {name}; leave this person out")
        rows.append(reference.face.embeddings[recogniser])
    return list(references), np.stack(rows)


def _likeness(
    portrait: MeasuredPicture,
    person: str,
    names: Sequence[str],
    embeddings: Any,
    recogniser: Recogniser,
) -> Likeness | None:
    if person not in names:
        raise ConfigError(f"no reference of {person}, who is on a portrait; give one")
    if portrait.face is None:
        return None
    cosines = dict(
        zip(names, (embeddings @ portrait.face.embeddings[recogniser]).tolist(), strict=True)
    )
    right = cosines.pop(person)
    nearest = max(cosines, key=lambda name: cosines[name])
    return Likeness(
        right=right,
        others=float(np.mean([*cosines.values()])),
        nearest=cosines[nearest],
        nearest_person=nearest,
    )
