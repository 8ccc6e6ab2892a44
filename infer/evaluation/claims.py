"""What the measures of several adapters prove: a table of claims, each with its values.

Names of adapters: `seed-1`, `seed-2` … were trained alike with different seeds, and can have more
steps than the others. `untrained` took one step with a learning rate of nearly 0; `whole` is like
`seed-1` but with as many steps as the following ones; `no-localisation` was trained without the
localisation loss; `unpaired` with each photograph as its own reference; the others lack a part, or
differ as their name says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

Results = Mapping[str, Any]  # of one adapter: measure → values, as in JSON

ADVANTAGE: Final = 0.20  # of ArcFace's cosine, to the right person against the others
REGION_RATIO: Final = 2.0  # change inside a region against outside
ATTENTION_RATIO: Final = 2.0  # share inside the mask, with the localisation loss against without
TEXT_POINTS: Final = 0.10  # by which a share may differ from the base's


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A value of a claim: mean and 95 % interval; low and high are None where there is none."""

    label: str
    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """wanted: in words; "" for what is only reported, whose `passed` is None."""

    name: str
    measure: str
    wanted: str
    passed: bool | None
    rows: tuple[Row, ...]


def claims(results: Mapping[str, Results]) -> list[Claim]:
    """Returns the claims that the results allow to decide.

    results: by name of the adapter. A claim whose measures are missing is left out.
    """
    makers = (_identity, _resembles, _regions, _localisation, _texts, _parts, _copying)
    return [claim for make in makers for claim in make(results)]


def _seeds(results: Mapping[str, Results], measure: str) -> dict[str, Any]:
    return {
        name: values[measure]
        for name, values in sorted(results.items())
        if name.startswith("seed-") and measure in values
    }


def _row(label: str, interval: Mapping[str, Any]) -> Row:
    return Row(
        label=label,
        mean=float(interval["mean"]),
        low=float(interval["low"]),
        high=float(interval["high"]),
    )


def _identity(results: Mapping[str, Results]) -> Iterator[Claim]:
    seeds = _seeds(results, "losses")
    if not seeds:
        return
    rows = [
        _row(f"{name}, {label}", values[key])
        for name, values in seeds.items()
        for key, label in (
            ("swapped_minus_right", "swapped minus right"),
            ("none_minus_right", "none minus right"),
            ("right", "right"),
            ("swapped", "swapped"),
            ("none", "none"),
        )
    ]
    yield Claim(
        name="The identity is used",
        measure="noise loss at fixed timesteps with the right, another person's and no identity",
        wanted="right below swapped; the interval of the difference is above 0 for each seed",
        passed=all(values["swapped_minus_right"]["low"] > 0 for values in seeds.values()),
        rows=tuple(rows),
    )


def _resembles(results: Mapping[str, Results]) -> Iterator[Claim]:
    seeds = _seeds(results, "portraits")
    if not seeds:
        return
    for recogniser, name, least, wanted in (
        ("arcface", "ArcFace", ADVANTAGE, f"at least {ADVANTAGE:.2f} for each seed"),
        ("sface", "SFace", 0.0, "the interval is above 0 for each seed"),
    ):
        own = {seed: values["resemblance"][recogniser] for seed, values in seeds.items()}
        advantages = [values["advantage"] for values in own.values()]
        rows = [_row(f"{seed}, advantage", values["advantage"]) for seed, values in own.items()]
        rows += [_row(f"{seed}, rank 1", values["first"]) for seed, values in own.items()]
        rows.append(Row(label="rank 1, chance", mean=next(iter(own.values()))["chance"]))
        for values in results.values():
            rows += [
                _row(
                    f"{label.replace('_', ' ')}, advantage",
                    row["resemblance"][recogniser]["advantage"],
                )
                for label, row in values.get("calibration", {}).items()
            ]
        yield Claim(
            name=f"Portraits resemble the person, by {name}",
            measure="cosine of portraits to the right person minus the mean to the others",
            wanted=wanted,
            passed=all(each["mean"] >= least if least else each["low"] > 0 for each in advantages),
            rows=tuple(rows),
        )
    shares = (("one_face", "one face"), ("has_parts", "eyes, nose and mouth"))
    yield Claim(
        name="Portraits have a face",
        measure="shares of the portraits",
        wanted="",
        passed=None,
        rows=tuple(
            _row(f"{seed}, {label}", values[key])
            for seed, values in seeds.items()
            for key, label in shares
        ),
    )


def _regions(results: Mapping[str, Results]) -> Iterator[Claim]:
    seeds = _seeds(results, "regions")
    if not seeds:
        return
    labels = (
        ("ratio", "inside to outside"),
        ("inside", "inside, grey levels"),
        ("outside", "outside, grey levels"),
    )
    yield Claim(
        name="Regions are used",
        measure="change of a portrait inside a region, against outside, when its token is another "
        "person's",
        wanted=f"at least {REGION_RATIO:g} times, for eyes or mouth of each seed",
        passed=all(
            any(
                use["ratio"] is not None and use["ratio"]["mean"] >= REGION_RATIO
                for use in values.values()
            )
            for values in seeds.values()
        ),
        rows=tuple(
            _row(f"{seed}, {region}, {label}", use[key])
            for seed, values in seeds.items()
            for region, use in values.items()
            for key, label in labels
            if use[key] is not None
        ),
    )


def _localisation(results: Mapping[str, Results]) -> Iterator[Claim]:
    seeds = _seeds(results, "attention")
    off = results.get("no-localisation", {}).get("attention")
    if not seeds or off is None:
        return
    rows = [_row(seed, values["overall"]["inside"]) for seed, values in seeds.items()]
    others = {
        "whole": "whole, with as many steps as the next",
        "no-localisation": "without the localisation loss",
        "untrained": "before training",
    }
    rows += [
        _row(label, results[name]["attention"]["overall"]["inside"])
        for name, label in others.items()
        if "attention" in results.get(name, {})
    ]
    rows.append(_row("share of the picture", off["overall"]["area"]))
    without = off["overall"]["inside"]["mean"]
    yield Claim(
        name="Localisation works",
        measure="share of a region token's attention inside the region's mask",
        wanted=f"at least {ATTENTION_RATIO:g} times that of an adapter trained without the loss",
        passed=all(
            values["overall"]["inside"]["mean"] >= ATTENTION_RATIO * without
            for values in seeds.values()
        ),
        rows=tuple(rows),
    )


def _texts(results: Mapping[str, Results]) -> Iterator[Claim]:
    seeds = _seeds(results, "texts")
    if not seeds:
        return
    rows = []
    for seed, values in seeds.items():
        rows += [
            _row(f"{seed}, {name}, difference", each) for name, each in values["difference"].items()
        ]
        for key, label in (("with_identity", "with the identity"), ("base", "base")):
            rows += [
                _row(f"{seed}, {each['trait']}, {label}, {which}", each[which])
                for each in values[key]
                for which in ("asked", "unasked")
            ]
    yield Claim(
        name="Text still works",
        measure="share of portraits that show what the prompt says, minus that of the base alone",
        wanted=f"not more than {TEXT_POINTS * 100:.0f} points below the base",
        passed=all(
            each["mean"] >= -TEXT_POINTS
            for values in seeds.values()
            for each in values["difference"].values()
        ),
        rows=tuple(rows),
    )


def _parts(results: Mapping[str, Results]) -> Iterator[Claim]:
    others = {
        name: values
        for name, values in sorted(results.items())
        if not name.startswith("seed-") and "losses" in values
    }
    if not others:
        return
    shown = {**{name: results[name] for name in _seeds(results, "losses")}, **others}
    rows = []
    for name, values in shown.items():
        rows.append(_row(f"{name}, swapped minus right", values["losses"]["swapped_minus_right"]))
        if "portraits" in values:
            by_name = values["portraits"]["resemblance"]
            rows += [
                _row(f"{name}, advantage by {label}", by_name[key]["advantage"])
                for key, label in (("arcface", "ArcFace"), ("sface", "SFace"))
            ]
    yield Claim(
        name="Parts matter",
        measure="adapters without a part, or trained otherwise; `whole` has as many steps as they",
        wanted="",
        passed=None,
        rows=tuple(rows),
    )


def _copying(results: Mapping[str, Results]) -> Iterator[Claim]:
    rows = [
        _row(f"{name}, {part}, {which.replace('_', ' ')}", values["copying"][part][which])
        for name, values in sorted(results.items())
        if "copying" in values
        for part in ("pose", "background")
        for which in ("to_reference", "to_another", "closer")
        if values["copying"][part][which] is not None
    ]
    if rows:
        yield Claim(
            name="Copying",
            measure="distance of pose (degrees) and background (grey levels) to the reference, and "
            "to another photograph of the person",
            wanted="",
            passed=None,
            rows=tuple(rows),
        )


def failed(table: Sequence[Claim]) -> list[str]:
    """Returns the names of the claims that don't hold."""
    return [claim.name for claim in table if claim.passed is False]
