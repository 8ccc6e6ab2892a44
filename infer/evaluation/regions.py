"""Whether an adapter uses the regions' tokens: what changes when one is another person's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from configs.errors import ConfigError
from infer.evaluation.faces import FaceMeasurer, MeasuredPicture, enlarged
from infer.evaluation.intervals import Interval, interval, mean, ratio
from infer.evaluation.people import of_another
from infer.evaluation.pictures import Painter
from infer.identity import Identity
from stages.codec import Image
from stages.regions import LABEL_IDS, REGION_LABELS, word_of

_SIDES: Final = ("inside", "outside")
# A smaller change outside counts as this, in grey levels, so that the ratio is finite.
_LEAST: Final = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionChange:
    """Mean absolute change of the pixels inside and outside a region's mask, in grey levels from 0
    to 255.
    """

    inside: float
    outside: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PersonRegion:
    """The mean change of a person's portraits, with the region of `other`. None if the region is in
    none of them.
    """

    person: str
    other: str
    change: RegionChange | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionUse:
    """inside, outside: see RegionChange. ratio: inside to outside; 1 if a region's token changes
    everything alike. None if the region is in nobody's portraits.
    """

    region: str
    inside: Interval | None
    outside: Interval | None
    ratio: Interval | None
    people: tuple[PersonRegion, ...]


def region_use(
    painter_of: Callable[[Identity], Painter],
    people: Mapping[str, Identity],
    region: str,
    prompt: str,
    seeds: Sequence[int],
    measurer: FaceMeasurer,
    *,
    seed: int,
) -> RegionUse:
    """Makes portraits, and again with one region's token of another person; all else is equal.

    painter_of: `infer.evaluation.pictures.painter` with pipeline and settings. people: by name;
    those without the region are left out. region: a word of REGION_WORDS. Where the text has no
    noun of the region, nothing changes. Raises ConfigError if fewer than two people have it.
    """
    able = {name: person for name, person in people.items() if region in _words(person)}
    if len(able) < 2:
        raise ConfigError(
            f"{len(able)} of {len(people)} people have the region {region!r}, expected at least 2; "
            "give more people, or another region"
        )
    others = of_another([*able])
    prompts = [prompt] * len(seeds)
    measured = []
    for name, person in able.items():
        swapped = person.with_region_of(able[others[name]], region)
        before = measurer.pictures(painter_of(person)(prompts, seeds))
        after = painter_of(swapped)(prompts, seeds)
        changes = [
            change
            for pair in zip(before, after, strict=True)
            if (change := region_change(*pair, region)) is not None
        ]
        measured.append(PersonRegion(person=name, other=others[name], change=_mean(changes)))
    return _summary(region, measured, seed)


def region_change(before: MeasuredPicture, after: Image, region: str) -> RegionChange | None:
    """Compares a portrait with one that differs in a region's token.

    before: whose label map has the mask. after: of the same size, before enlarging. Returns None if
    the portrait has no face, or the mask no pixel.
    """
    if before.face is None:
        return None
    labels = [LABEL_IDS[label] for label in REGION_LABELS[region]]
    mask = np.isin(before.face.labels, labels)
    if not mask.any() or mask.all():
        return None
    change = np.abs(enlarged(after).astype(np.float32) - before.picture).mean(axis=2)
    return RegionChange(inside=float(change[mask].mean()), outside=float(change[~mask].mean()))


def _mean(changes: Sequence[RegionChange]) -> RegionChange | None:
    inside, outside = (mean([getattr(each, side) for each in changes]) for side in _SIDES)
    return (
        None if inside is None or outside is None else RegionChange(inside=inside, outside=outside)
    )


def _summary(region: str, people: Sequence[PersonRegion], seed: int) -> RegionUse:
    inside, outside = (
        {
            each.person: None if each.change is None else getattr(each.change, side)
            for each in people
        }
        for side in _SIDES
    )
    name: dict[str, Any] = {"seed": seed, "name": f"region {region}"}
    measured = any(value is not None for value in inside.values())
    return RegionUse(
        region=region,
        inside=interval(inside, **name) if measured else None,
        outside=interval(outside, **name) if measured else None,
        ratio=ratio(inside, outside, least=_LEAST, **name) if measured else None,
        people=tuple(people),
    )


def _words(person: Identity) -> set[str]:
    return {word_of(region) for region in person.regions}
