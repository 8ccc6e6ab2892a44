"""Traits of prompts, and copying of photographs, both on photographs in place of portraits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest

from infer.evaluation.copying import background_distance, copying, pose_distance
from infer.evaluation.faces import FaceMeasurer, MeasuredPicture
from infer.evaluation.people import of_another
from infer.evaluation.pictures import seeds_of
from infer.evaluation.texts import (
    PLAIN,
    TRAITS,
    Trait,
    TraitShares,
    trait_differences,
    trait_shares,
)
from stages.codec import Image

Pictures = dict[str, MeasuredPicture]


def smiles(picture: MeasuredPicture) -> bool:
    return picture.face is not None and picture.face.appearance.smile


def test_a_trait_counts_where_a_prompt_says_it(
    small_photos: Pictures, measurer: FaceMeasurer
) -> None:
    smiling = next(each.picture for each in small_photos.values() if smiles(each))
    serious = next(each.picture for each in small_photos.values() if not smiles(each))
    [smile] = [trait for trait in TRAITS if trait.name == "smile"]
    calls: list[tuple[str, list[int]]] = []

    def follows(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        calls.append((prompts[0], list(seeds)))
        return [smiling if "smiling" in prompt else serious for prompt in prompts]

    def ignores(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        return [np.full((64, 64, 3), 128, np.uint8)] * len(prompts)

    [followed] = trait_shares({"a": follows, "b": follows}, 1, measurer, seed=1, traits=[smile])
    [mixed] = trait_shares({"a": follows, "b": ignores}, 1, measurer, seed=1, traits=[smile])
    assert (followed.asked.mean, followed.unasked.mean) == (1, 0)
    assert mixed.asked.mean == 0.5 and mixed.people == {"a": 1, "b": 0}
    difference = trait_differences([mixed], [followed], seed=1)["smile"]
    assert (difference.mean, difference.identities) == (-0.5, 2)
    assert calls[:4] == [
        (prompt, seeds_of(1, 1, "traits", name))
        for prompt in (PLAIN, smile.prompt)
        for name in "ab"
    ]
    json.dumps(asdict(followed))


def test_each_trait_is_judged_by_its_own_measure(small_photos: Pictures) -> None:
    face = next(iter(small_photos.values())).face
    assert face is not None
    bare = replace(face.appearance, glasses=False, smile=False, hair_color="blond")
    traits = {trait.name: trait for trait in TRAITS}
    assert not any(trait.shows(bare) for trait in TRAITS)
    for name, field, value in (
        ("glasses", "glasses", True),
        ("black hair", "hair_color", "black"),
        ("smile", "smile", True),
    ):
        changed = replace(bare, **{field: value})
        assert [each.name for each in TRAITS if each.shows(changed)] == [name]
        assert name.removesuffix("e") in traits[name].prompt
    assert traits["black hair"].shows(replace(bare, hair_color="")) is None


def test_a_picture_with_an_unknown_trait_is_not_counted(
    small_photos: Pictures, measurer: FaceMeasurer
) -> None:
    pictures = [each.picture for each in small_photos.values() if each.face is not None][:2]

    def drawn(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        return pictures

    def share(*shown: bool | None) -> TraitShares:
        answers = [*shown, True, True] * 2  # of two people, for both prompts
        trait = Trait("any", PLAIN, lambda _: answers.pop(0))
        return trait_shares({"a": drawn, "b": drawn}, 2, measurer, seed=1, traits=[trait])[0]

    assert share(False, None).people["a"] == 0
    assert share(None, None).people["a"] is None
    [difference] = trait_differences([share(None, None)], [share(True, True)], seed=1).values()
    assert difference.identities == 1


def test_a_copied_photograph_is_closer_than_another(small_photos: Pictures) -> None:
    others = {name: small_photos[other] for name, other in of_another([*small_photos]).items()}
    copied = copying({n: [p] for n, p in small_photos.items()}, small_photos, others, seed=1)
    for part in (copied.pose, copied.background):
        assert part.to_reference is not None and part.to_another is not None
        assert part.closer is not None and part.to_reference.mean == 0 < part.closer.low
        assert part.closer.mean == pytest.approx(part.to_another.mean)
    swapped = copying({n: [p] for n, p in small_photos.items()}, others, small_photos, seed=1)
    assert swapped.pose.closer is not None and swapped.pose.closer.high < 0
    assert swapped.background.closer is not None and swapped.background.closer.high < 0
    nobody = copying({n: [p] for n, p in small_photos.items()}, small_photos, {}, seed=1)
    assert nobody.pose.closer is None and not nobody.people
    json.dumps(asdict(copied))


def test_distances_are_those_of_pose_and_of_the_common_background(small_photos: Pictures) -> None:
    photo = next(iter(small_photos.values()))
    assert photo.face is not None
    turned = replace(photo.face, yaw=photo.face.yaw + 8, pitch=photo.face.pitch - 2)
    assert pose_distance(photo, replace(photo, face=turned)) == pytest.approx(5)
    labels = np.zeros((256, 256), np.uint8)
    labels[:, 100:180] = 1
    first = replace(photo, picture=np.full((256, 256, 3), 50, np.uint8))
    first = replace(first, face=replace(photo.face, labels=labels))
    picture = first.picture.copy()
    picture[:, :100] += 30
    picture[:, 100:180] += 90  # the person
    assert background_distance(first, replace(first, picture=picture)) == pytest.approx(
        30 * 12 / (12 + 9)  # columns of 8 pixels that are background only, left and right
    )
    everywhere = replace(photo.face, labels=np.ones_like(labels))
    assert background_distance(first, replace(first, face=everywhere)) is None
    assert pose_distance(first, replace(first, face=None)) is None
