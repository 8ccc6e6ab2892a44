"""Whether prompts still work with an adapter: how many pictures show what a prompt says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from infer.evaluation.faces import FaceMeasurer, MeasuredPicture
from infer.evaluation.intervals import Interval, interval, mean
from infer.evaluation.pictures import Painter, seeds_of
from stages.backends.appearance import Appearance

PLAIN: Final = "A portrait of a person."  # says nothing of the person
_BLACK: Final = ("black", "dark")  # dark: black or dark brown, which the light doesn't tell apart


@dataclass(frozen=True, slots=True)
class Trait:
    """What a prompt may say, in the words of the pipeline's captions. shows: whether a picture
    shows it; None if that can't be determined.
    """

    name: str
    prompt: str
    shows: Callable[[Appearance], bool | None]


TRAITS: Final = (
    Trait("glasses", "A portrait of a person, wearing glasses.", lambda seen: seen.glasses),
    Trait(
        "black hair",
        "A portrait of a person with black hair.",
        lambda seen: seen.hair_color in _BLACK if seen.hair_color else None,
    ),
    Trait("smile", "A portrait of a person, smiling and showing teeth.", lambda seen: seen.smile),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraitShares:
    """Shares of pictures that show a trait. asked: of those whose prompt says it. unasked: of the
    same seeds with a prompt that says nothing. A picture without a face shows nothing.
    Pictures for which it can't be determined, such as hair in the dark, aren't counted. people:
    person → share of `asked`, None without any counted picture.
    """

    trait: str
    prompt: str
    asked: Interval
    unasked: Interval
    people: dict[str, float | None]


def trait_shares(
    painters: Mapping[str, Painter],
    count: int,
    measurer: FaceMeasurer,
    *,
    seed: int,
    traits: Sequence[Trait] = TRAITS,
) -> tuple[TraitShares, ...]:
    """Makes `count` pictures of each prompt by each painter, and judges them by their appearance.

    painters: of people, by name. The seeds depend on the names: for the base alone, give its
    painter under the same names, so that its pictures begin from the same noise.
    """
    plain = _pictures(painters, PLAIN, count, measurer, seed)
    measured = []
    for trait in traits:
        asked = _shares(_pictures(painters, trait.prompt, count, measurer, seed), trait)
        name = f"trait {trait.name}"
        measured.append(
            TraitShares(
                trait=trait.name,
                prompt=trait.prompt,
                asked=interval(asked, seed=seed, name=name),
                unasked=interval(_shares(plain, trait), seed=seed, name=name),
                people=asked,
            )
        )
    return tuple(measured)


def trait_differences(
    with_adapter: Sequence[TraitShares], base: Sequence[TraitShares], *, seed: int
) -> dict[str, Interval]:
    """Returns for each trait the share with the adapter minus that of the base, over the names that
    have both.
    """
    differences = {}
    for own, other in zip(with_adapter, base, strict=True):
        both = {
            name: share - alone
            for name, share in own.people.items()
            if share is not None and (alone := other.people[name]) is not None
        }
        name = f"trait {own.trait}, difference"
        differences[own.trait] = interval(both, seed=seed, name=name)
    return differences


def _pictures(
    painters: Mapping[str, Painter], prompt: str, count: int, measurer: FaceMeasurer, seed: int
) -> dict[str, list[MeasuredPicture]]:
    return {
        name: measurer.pictures(paint([prompt] * count, seeds_of(count, seed, "traits", name)))
        for name, paint in painters.items()
    }


def _shares(
    pictures: Mapping[str, Sequence[MeasuredPicture]], trait: Trait
) -> dict[str, float | None]:
    shares = {}
    for name, own in pictures.items():
        shown = [each.face is not None and trait.shows(each.face.appearance) for each in own]
        shares[name] = mean([each for each in shown if each is not None])
    return shares
