"""From which cosine two faces are taken for one person when somebody asks to be removed, by
embedder, with the error rates that were measured.

This threshold is lower than those of duplicates and identities: a picture that is missed stays, and
one that is matched wrongly is seen on the page that `takedown` writes first. `python -m
bench.people FOLDER` measures the rates on your own photographs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from scipy.special import betaincinv

_CONFIDENCE: Final = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class SamePerson:
    """A threshold of an embedder. cosine: two faces match from this on. measured: sentences about
    how many pictures of a person it finds, and on which photographs; () if nobody measured it.
    false, pairs: how many pairs of different people matched, of how many compared; 0 and 0 if
    nobody measured it.
    """

    cosine: float
    measured: tuple[str, ...] = ()
    false: int = 0
    pairs: int = 0


# by name in the table of weights
SAME_PERSON: Final[dict[str, SamePerson]] = {
    "w600k_mbf": SamePerson(
        cosine=0.40,
        measured=(
            "Of 223 pairs of photographs of one person, it found 99 % of the person's pictures in "
            "the mean, and all of them in 95 % of the queries (at 0.60: 75 % and 44 %).",
        ),
        false=0,
        pairs=14_142,
    ),
}
_UNMEASURED: Final = SamePerson(cosine=0.40)


def same_person(weights: str) -> SamePerson:
    """Returns the threshold of an embedder; without rates if none were measured for it."""
    return SAME_PERSON.get(weights, _UNMEASURED)


def upper_bound(false: int, pairs: int) -> float:
    """Returns the share of pairs of different people that match, of which the true share is not
    more with 95 % confidence (Clopper-Pearson, one-sided), when `false` of `pairs` matched. It is
    about 3 / pairs if none did, and 1 if no pair was compared.
    """
    if false >= pairs:
        return 1.0
    return float(betaincinv(false + 1, pairs - false, _CONFIDENCE))
