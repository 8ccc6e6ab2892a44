"""Another person's region: planted changes of pictures, and the tokens of a real adapter."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import ConfigError
from infer.evaluation.faces import FaceMeasurer, MeasuredPicture
from infer.evaluation.pictures import Painter, painter
from infer.evaluation.regions import region_change, region_use
from infer.identity import Identity
from infer.pipelines import ConsistentIDPipeline
from stages.codec import Image
from stages.regions import region_masks
from tests.infer.helpers import contexts, small


@pytest.fixture(scope="module")
def two(identities: dict[str, Identity]) -> dict[str, Identity]:
    return dict(list(identities.items())[:2])


def mask_of(measured: MeasuredPicture, region: str) -> Image:
    assert measured.face is not None
    return region_masks(measured.face.labels, "corrected")[region].astype(np.uint8)[..., None]


def test_only_the_region_is_another_persons(two: dict[str, Identity]) -> None:
    first, second = two.values()
    swapped = first.with_region_of(second, "mouth")
    own, foreign = first.regions.index("mouth"), second.regions.index("mouth")
    assert torch.equal(swapped.region_hidden[own], second.region_hidden[foreign])
    others = [row for row in range(len(first.regions)) if row != own]
    assert torch.equal(swapped.region_hidden[others], first.region_hidden[others])
    assert not torch.equal(swapped.region_hidden, first.region_hidden)
    assert torch.equal(swapped.clip_hidden, first.clip_hidden) and swapped.record is first.record
    lacking = replace(second, regions=(), region_hidden=second.region_hidden[:0])
    with pytest.raises(ValueError, match=r"'mouth' can't be taken from .*, whose regions are none"):
        first.with_region_of(lacking, "mouth")


def test_a_swapped_region_changes_one_token_of_the_second_phase(
    pipe: ConsistentIDPipeline, two: dict[str, Identity], adapter: Path
) -> None:
    first, second = two.values()
    swapped = first.with_region_of(second, "nose")
    states, stop = contexts(pipe)
    for each in (first, swapped):
        painter(pipe, small(adapter), each)(["a man"], [3])
    stop()
    changed = [(a != b).any(-1)[-1].sum() for a, b in zip(states[:4], states[4:], strict=True)]
    assert changed == [0, 0, 1, 1]  # tokens, at each of the four steps


def test_a_change_is_measured_inside_and_outside_the_mask(
    small_photos: dict[str, MeasuredPicture],
) -> None:
    before = next(iter(small_photos.values()))
    mask = mask_of(before, "nose")
    picture = (before.picture // 2).astype(np.uint8)
    before = replace(before, picture=picture)
    change = region_change(before, picture + 40 * mask, "nose")
    assert change is not None and (change.inside, change.outside) == (40, 0)
    change = region_change(before, picture + 10 - 10 * mask, "nose")
    assert change is not None and (change.inside, change.outside) == (0, 10)
    assert region_change(replace(before, face=None), picture, "nose") is None
    assert before.face is not None
    empty = replace(before.face, labels=np.zeros_like(before.face.labels))
    assert region_change(replace(before, face=empty), picture, "nose") is None


def test_portraits_whose_region_follows_its_token_have_a_large_ratio(
    two: dict[str, Identity], small_photos: dict[str, MeasuredPicture], measurer: FaceMeasurer
) -> None:
    photos = {two[name].record.key: small_photos[name] for name in two}
    own = {person.record.key: person.region_hidden for person in two.values()}

    def painter_of(inside: int, outside: int) -> object:
        def of_person(person: Identity) -> Painter:
            photo = photos[person.record.key]
            picture = (photo.picture // 2).astype(np.uint8)
            if not torch.equal(person.region_hidden, own[person.record.key]):
                mask = mask_of(photo, "mouth")
                picture = picture + np.where(mask, inside, outside).astype(np.uint8)
            return lambda prompts, seeds: [picture] * len(prompts)

        return of_person

    used = region_use(painter_of(40, 2), two, "mouth", "a man", [1], measurer, seed=1)  # type: ignore[arg-type]
    assert used.ratio is not None and used.ratio.low > 8 and used.ratio.identities == 2
    assert [person.other for person in used.people] == [*two][::-1]
    even = region_use(painter_of(5, 5), two, "mouth", "a man", [1], measurer, seed=1)  # type: ignore[arg-type]
    assert even.ratio is not None and even.ratio.mean == 1
    still = region_use(painter_of(0, 0), two, "mouth", "a man", [1], measurer, seed=1)  # type: ignore[arg-type]
    assert still.ratio is not None and still.ratio.mean == 0
    json.dumps(asdict(used))


def test_pictures_without_faces_have_no_ratio(
    two: dict[str, Identity], measurer: FaceMeasurer
) -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    used = region_use(lambda _: lambda p, s: [grey], two, "mouth", "a man", [1], measurer, seed=1)
    assert used.ratio is used.inside is None and all(each.change is None for each in used.people)
    with pytest.raises(ConfigError, match="1 of 1 people have the region 'nose'"):
        one = dict(list(two.items())[:1])
        region_use(lambda _: lambda p, s: [grey], one, "nose", "a man", [1], measurer, seed=1)
