"""Whether portraits copy pose and background of the reference photograph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np

from infer.evaluation.faces import MeasuredPicture
from infer.evaluation.intervals import Interval, interval, mean
from stages.regions import foreground_mask

_SIDE: Final = 32  # pixels, at which backgrounds are compared
_LEAST: Final = 32  # pixels that must be background in both pictures, of _SIDE²


@dataclass(frozen=True, slots=True, kw_only=True)
class Distances:
    """How far portraits are from a photograph. pose: mean of the absolute differences of yaw and
    pitch, in degrees. background: mean absolute difference of the pixels that are background in
    both, in grey levels from 0 to 255. None where it can't be measured.
    """

    pose: float | None
    background: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PersonCopying:
    """Mean distances of a person's portraits."""

    person: str
    to_reference: Distances
    to_another: Distances


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiedPart:
    """closer: distance to another photograph minus distance to the reference; above 0 where the
    reference is copied. None if nobody's portraits can be measured.
    """

    to_reference: Interval | None
    to_another: Interval | None
    closer: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Copying:
    """pose, background: see Distances."""

    pose: CopiedPart
    background: CopiedPart
    people: tuple[PersonCopying, ...]


def copying(
    portraits: Mapping[str, Sequence[MeasuredPicture]],
    references: Mapping[str, MeasuredPicture],
    others: Mapping[str, MeasuredPicture],
    *,
    seed: int,
) -> Copying:
    """Compares portraits with the reference photograph and another one of the same person.

    portraits, references, others: by person; people without another photograph are left out.
    Pictures are compared as they are cropped: measure photographs that have the portraits' crop.
    """
    people = [
        PersonCopying(
            person=name,
            to_reference=_distances(own, references[name]),
            to_another=_distances(own, others[name]),
        )
        for name, own in portraits.items()
        if name in others
    ]
    return Copying(
        pose=_part(people, "pose", seed),
        background=_part(people, "background", seed),
        people=tuple(people),
    )


def pose_distance(one: MeasuredPicture, other: MeasuredPicture) -> float | None:
    """Returns the mean absolute difference of yaw and pitch, in degrees; None without a face."""
    if one.face is None or other.face is None:
        return None
    return (abs(one.face.yaw - other.face.yaw) + abs(one.face.pitch - other.face.pitch)) / 2


def background_distance(one: MeasuredPicture, other: MeasuredPicture) -> float | None:
    """Returns the mean absolute difference of the pixels that are background in both pictures, in
    grey levels; None without a face, or if there are too few.
    """
    if one.face is None or other.face is None:
        return None
    (first, first_back), (second, second_back) = (_small(each) for each in (one, other))
    both = first_back & second_back
    return float(np.abs(first - second)[both].mean()) if both.sum() >= _LEAST else None


def _small(measured: MeasuredPicture) -> tuple[Any, Any]:
    """Returns a picture at low resolution (32, 32, 3), and where all of a pixel is background."""
    assert measured.face is not None, "the caller has checked it"
    foreground = foreground_mask(measured.face.labels, "corrected").astype(np.float32)
    picture, covered = (
        cv2.resize(each, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
        for each in (measured.picture.astype(np.float32), foreground)
    )
    return picture, covered == 0


def _distances(portraits: Sequence[MeasuredPicture], photo: MeasuredPicture) -> Distances:
    poses = [pose_distance(each, photo) for each in portraits]
    backgrounds = [background_distance(each, photo) for each in portraits]
    return Distances(
        pose=mean([each for each in poses if each is not None]),
        background=mean([each for each in backgrounds if each is not None]),
    )


def _part(people: Sequence[PersonCopying], name: str, seed: int) -> CopiedPart:
    pairs = {
        each.person: (getattr(each.to_reference, name), getattr(each.to_another, name))
        for each in people
    }
    both = {person: pair for person, pair in pairs.items() if None not in pair}
    if not both:
        return CopiedPart(to_reference=None, to_another=None, closer=None)

    def summary(values: Mapping[str, float], what: str) -> Interval:
        return interval(values, seed=seed, name=f"copied {name}, {what}")

    return CopiedPart(
        to_reference=summary({key: own for key, (own, _) in both.items()}, "reference"),
        to_another=summary({key: other for key, (_, other) in both.items()}, "another"),
        closer=summary({key: other - own for key, (own, other) in both.items()}, "closer"),
    )
