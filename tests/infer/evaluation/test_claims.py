"""Claims decided from results: which figures make which claim fail, and what the page shows."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.errors import ConfigError
from infer.evaluation.claims import claims, failed
from infer.evaluation.page import write_proof


def figure(mean: float, spread: float = 0.01) -> dict[str, float]:
    return {"mean": mean, "low": mean - spread, "high": mean + spread, "identities": 50}


def resemblance(arcface: float, sface: float) -> dict[str, Any]:
    return {
        name: {"advantage": figure(value), "first": figure(0.5), "chance": 0.02}
        for name, value in (("arcface", arcface), ("sface", sface))
    }


def measures() -> dict[str, Any]:
    """Results of an adapter for which every claim holds."""
    trait = {"trait": "glasses", "asked": figure(0.8), "unasked": figure(0.1)}
    return {
        "losses": {
            "right": figure(0.20),
            "swapped": figure(0.25),
            "none": figure(0.22),
            "swapped_minus_right": figure(0.05),
            "none_minus_right": figure(0.02),
        },
        "portraits": {
            "one_face": figure(0.99),
            "has_parts": figure(0.95),
            "resemblance": resemblance(0.3, 0.2),
        },
        "regions": {
            "eyes": {"ratio": figure(3.0), "inside": figure(6.0), "outside": figure(2.0)},
            "mouth": {"ratio": None, "inside": None, "outside": None},
        },
        "attention": {"overall": {"inside": figure(0.6), "area": figure(0.05)}},
        "texts": {
            "with_identity": [trait],
            "base": [trait],
            "difference": {"glasses": figure(0.0)},
        },
        "copying": {
            part: {which: figure(1.0) for which in ("to_reference", "to_another", "closer")}
            for part in ("pose", "background")
        },
        "calibration": {"another_person": {"resemblance": resemblance(-0.1, -0.1)}},
    }


@pytest.fixture
def results() -> dict[str, dict[str, Any]]:
    off = measures()
    off["attention"]["overall"]["inside"] = figure(0.1)
    return {
        "seed-1": measures(),
        "seed-2": measures(),
        "no-localisation": {"attention": off["attention"], "losses": off["losses"]},
    }


def test_all_claims_hold_for_good_results(results: dict[str, dict[str, Any]]) -> None:
    table = claims(results)
    assert failed(table) == []
    assert sum(claim.passed is True for claim in table) == 6
    assert {claim.name for claim in table if claim.passed is None} == {
        "Portraits have a face",
        "Parts matter",
        "Copying",
    }


def _swapped(values: dict[str, Any]) -> None:
    values["losses"]["swapped_minus_right"] = figure(0.005, spread=0.01)


def _alike(values: dict[str, Any]) -> None:
    values["portraits"]["resemblance"]["arcface"]["advantage"] = figure(0.19)


def _other_recogniser(values: dict[str, Any]) -> None:
    values["portraits"]["resemblance"]["sface"]["advantage"] = figure(0.01, spread=0.02)


def _everywhere(values: dict[str, Any]) -> None:
    values["regions"]["eyes"]["ratio"] = figure(1.9)


def _spread(values: dict[str, Any]) -> None:
    values["attention"]["overall"]["inside"] = figure(0.19)


def _deaf(values: dict[str, Any]) -> None:
    values["texts"]["difference"]["glasses"] = figure(-0.11)


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (_swapped, "The identity is used"),
        (_alike, "Portraits resemble the person, by ArcFace"),
        (_other_recogniser, "Portraits resemble the person, by SFace"),
        (_everywhere, "Regions are used"),
        (_spread, "Localisation works"),
        (_deaf, "Text still works"),
    ],
)
def test_one_bad_seed_makes_its_claim_fail(
    results: dict[str, dict[str, Any]], spoil: Callable[[dict[str, Any]], None], name: str
) -> None:
    results = copy.deepcopy(results)
    spoil(results["seed-2"])
    assert failed(claims(results)) == [name]


def test_a_claim_without_its_measures_is_left_out(results: dict[str, dict[str, Any]]) -> None:
    del results["no-localisation"]
    assert "Localisation works" not in {claim.name for claim in claims(results)}


def test_the_page_and_the_json_have_every_figure(
    results: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    _alike(results["seed-2"])
    (tmp_path / "results").mkdir()
    for name, values in results.items():
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(values))
    assert write_proof(tmp_path) == ["Portraits resemble the person, by ArcFace"]
    html = (tmp_path / "index.html").read_text()
    content = json.loads((tmp_path / "proof.json").read_text())
    assert content["holds"] is False
    assert html.count("<tr>") == sum(len(claim["rows"]) for claim in content["claims"])
    assert html.count(">fails<") == 1
    assert "0.190" in html


def test_a_folder_without_results_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no results"):
        write_proof(tmp_path)
