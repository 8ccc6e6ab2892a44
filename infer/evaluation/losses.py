"""Whether an adapter uses the identity: the noise loss with the right person's conditions, with
another's, and with none.

All else is equal: sample, noise, timestep, text and masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from infer.evaluation.denoising import TIMESTEPS, AdaptedModel, Samples, denoised, noisy_samples
from infer.evaluation.intervals import Interval, interval, mean
from infer.evaluation.people import Person, by_person, of_another
from model.conditions import Conditions

Kind = Literal["right", "swapped", "none"]
_KINDS: Final[tuple[Kind, ...]] = ("right", "swapped", "none")

Losses = tuple[float, ...]  # at each of the timesteps


@dataclass(frozen=True, slots=True, kw_only=True)
class PersonLosses:
    """The noise losses of a person's sample, at each timestep.

    right: with the person's reference photograph. swapped: with that of `other`. none: with a
    dropped identity, as in training.
    """

    person: str
    other: str
    right: Losses
    swapped: Losses
    none: Losses


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseLosses:
    """Means over people and timesteps, with intervals by identity. An adapter that uses the
    identity has both differences above 0.
    """

    timesteps: tuple[int, ...]
    right: Interval
    swapped: Interval
    none: Interval
    swapped_minus_right: Interval
    none_minus_right: Interval
    people: tuple[PersonLosses, ...]


def noise_losses(
    model: AdaptedModel,
    people: Sequence[Person],
    *,
    seed: int,
    timesteps: Sequence[int] = TIMESTEPS,
) -> NoiseLosses:
    """Measures the noise loss on a sample of each person.

    people: at least two. Each gets the identity of the next one as the swapped one. Raises
    ConfigError for fewer people, or timesteps that don't exist.
    """
    owners = by_person(people, people)
    others = of_another([person.name for person in people])
    samples = noisy_samples(model, people, seed=seed, timesteps=timesteps)
    right, swapped = (
        [
            model.conditions(record, owners[shown].reference)
            for record, shown in zip(samples.records, names, strict=True)
        ]
        for names in (samples.people, [others[name] for name in samples.people])
    )
    losses: dict[Kind, list[Losses]] = {
        "right": _losses(model, samples, right),
        "swapped": _losses(model, samples, swapped),
        "none": _losses(model, samples, right, without_identity=True),
    }
    measured = tuple(
        PersonLosses(
            person=name,
            other=others[name],
            right=losses["right"][row],
            swapped=losses["swapped"][row],
            none=losses["none"][row],
        )
        for row, name in enumerate(samples.people)
    )
    means = {
        kind: {name: mean(values) or 0.0 for name, values in zip(samples.people, rows, strict=True)}
        for kind, rows in losses.items()
    }

    def difference(kind: Kind) -> Interval:
        values = {name: means[kind][name] - means["right"][name] for name in samples.people}
        return interval(values, seed=seed, name=f"noise loss, {kind} minus right")

    return NoiseLosses(
        timesteps=samples.timesteps,
        **{kind: interval(means[kind], seed=seed, name=f"noise loss, {kind}") for kind in _KINDS},
        swapped_minus_right=difference("swapped"),
        none_minus_right=difference("none"),
        people=measured,
    )


def _losses(
    model: AdaptedModel,
    samples: Samples,
    conditions: Sequence[Conditions],
    *,
    without_identity: bool = False,
) -> list[Losses]:
    """Returns the losses of each sample at each timestep."""
    values: list[list[float]] = [[] for _ in conditions]
    for batch in denoised(model, samples, conditions, without_identity=without_identity):
        for (sample, _), error in zip(batch.rows, batch.errors.tolist(), strict=True):
            values[sample].append(error)
    return [tuple(each) for each in values]
