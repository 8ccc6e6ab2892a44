"""Rows that stand beside the resemblance of portraits: what it can be at best, and by chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from configs.portraits import InferConfig
from infer.evaluation.faces import FaceMeasurer, MeasuredPicture
from infer.evaluation.intervals import named_seed
from infer.evaluation.people import Person, by_person, of_another
from infer.evaluation.pictures import noise_pictures, painter, photographs, through_vae
from infer.evaluation.resemblance import PortraitMeasures, measure_portraits
from infer.mixin import ConsistentIDMixin


def calibration(
    pipe: ConsistentIDMixin,
    settings: InferConfig,
    people: Sequence[Person],
    references: Mapping[str, MeasuredPicture],
    prompt: str,
    seeds: Sequence[int],
    measurer: FaceMeasurer,
    *,
    seed: int,
) -> dict[str, PortraitMeasures]:
    """Measures as if they were portraits of the people:

    photograph: the reference photograph, reduced to the size of the training images.
    photograph_vae: the same through the VAE. another_photograph_vae: another one of the person,
    for those who have one; left out if nobody has. another_person: `photograph` of the next
    person. base: pictures of the base alone, with the portraits' prompt and seeds. noise: pictures
    that the VAE makes of pure noise.

    references: see `measure_portraits`. Raises ConfigError for fewer than two people.
    """
    side = pipe.adapter.model.spec.resolution
    names = [person.name for person in people]
    others = of_another(names)
    several = {person.name: person.another for person in people if person.another is not None}
    photos = photographs([person.reference for person in people], side)
    more = photographs([*several.values()], side)
    base = measurer.pictures(painter(pipe, settings, None)([prompt] * len(seeds), seeds))
    noise_seeds = [named_seed(seed, "calibration", name) for name in names]
    reduced = by_person(people, measurer.pictures(photos))
    more_decoded = measurer.pictures(through_vae(pipe, more))
    rows: dict[str, dict[str, MeasuredPicture]] = {
        "photograph": reduced,
        "photograph_vae": by_person(people, measurer.pictures(through_vae(pipe, photos))),
        "another_photograph_vae": dict(zip(several, more_decoded, strict=True)),
        "another_person": {name: reduced[others[name]] for name in names},
        "noise": by_person(people, measurer.pictures(noise_pictures(pipe, noise_seeds, side))),
    }
    pictures = {
        row: {name: [picture] for name, picture in own.items()} for row, own in rows.items() if own
    }
    pictures["base"] = dict.fromkeys(names, base)
    return {row: measure_portraits(own, references, seed=seed) for row, own in pictures.items()}
