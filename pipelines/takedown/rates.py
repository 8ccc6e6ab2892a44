"""Rates: the measured error rates of a removal request by photograph, as sentences."""

from __future__ import annotations

import math

from pipelines.takedown.matching import Search
from stages.backends.same_person import same_person, upper_bound


def rates(search: Search) -> list[str]:
    """Returns sentences about the threshold of a request by photograph, its measured error rates,
    and what wasn't compared; [] for other requests.
    """
    request = search.request
    if request is None:
        return []
    person = same_person(request.weights)
    photos = len(request.vectors)
    lines = [
        f"{search.faces:,} faces were compared with {photos} photograph{'s' * (photos != 1)}; a "
        f"face matches from a cosine of {request.cosine:.2f} on ({request.weights})."
    ]
    measure = f"`python -m bench.people FOLDER --weights {request.weights}` measures them on yours."
    if not person.pairs:
        lines.append(f"No error rates were measured for {request.weights}. {measure}")
    elif request.cosine != person.cosine:
        lines.append(
            f"Error rates were measured at {person.cosine:.2f}, not at this threshold. {measure}"
        )
    else:
        bound = upper_bound(person.false, person.pairs)
        comparisons = search.faces * photos
        matched = f"{person.false} of {person.pairs:,} pairs of different people matched"
        lines += [
            *person.measured,
            f"{matched}. So with 95 % confidence at most {100 * bound:.2g} % of all such pairs do: "
            f"here at most {_at_most(bound * comparisons)} false matches in {comparisons:,} "
            f"comparisons, if your photographs are like those. {measure}",
        ]
    if search.not_compared:
        lines.append(
            f"{search.not_compared:,} inputs show a face, but have no embedding, since they were "
            "dropped or failed before; they were not compared."
        )
    if search.foreign:
        lines.append(
            f"{search.foreign:,} inputs brought the embedding of their main face along. If it is "
            f"not of {request.weights}, the person in it is not found."
        )
    return lines


def _at_most(number: float) -> str:
    """Returns a bound, rounded up: 0.02 or 2,119."""
    return f"{math.ceil(number):,}" if number >= 1 else f"{math.ceil(number * 100) / 100:g}"
