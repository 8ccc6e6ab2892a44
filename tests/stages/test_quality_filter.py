"""Rules on recorded figures: each with its reason, both sides of its limit, and off at 0."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest

from configs.errors import ConfigError
from configs.quality import RulesConfig
from stages.annotations import Measures
from stages.quality_filter import RULES, Rule, verdict
from stages.record import Face

FACE = Face(
    box=(100.0, 100.0, 200.0, 220.0),
    landmarks=((120.0, 150.0), (180.0, 150.0), (150.0, 175.0), (130.0, 195.0), (170.0, 195.0)),
    score=0.8,
)
FINE = Measures(
    sharpness=0.33,
    brightness=0.6,
    clipped=0.0,
    yaw=-10.0,
    pitch=5.0,
    roll=1.0,
    occlusion=0.0,
    hash="0" * 64,
)


@dataclass(frozen=True, slots=True)
class Facts:
    source_width: int = 800
    source_height: int = 600
    faces: tuple[Face, ...] = (FACE,)
    main_face: Face = FACE
    identity_norm: float | None = 20.0
    measures: Measures | None = FINE


def measured(**figures: float) -> Facts:
    return Facts(measures=replace(FINE, **figures))  # type: ignore[arg-type]


BROKEN = {
    "min_side": (
        Facts(source_width=90),
        "low_resolution",
        "short side in pixels 90, expected at least 256",
    ),
    "max_faces": (Facts(faces=(FACE, FACE)), "too_many_faces", "faces 2, expected at most 1"),
    "min_faces": (Facts(faces=()), "too_few_faces", "faces 0, expected at least 1"),
    "min_face": (
        Facts(main_face=replace(FACE, box=(100.0, 100.0, 150.5, 220.0))),
        "face_too_small",
        "face in pixels 50.5, expected at least 64",
    ),
    "min_score": (
        Facts(main_face=replace(FACE, score=0.4)),
        "low_score",
        "detection score 0.4, expected at least 0.5",
    ),
    "min_sharpness": (
        measured(sharpness=0.1234),
        "blurred",
        "sharpness 0.12, expected at least 0.22",
    ),
    "min_brightness": (
        measured(brightness=0.05),
        "too_dark",
        "brightness 0.05, expected at least 0.12",
    ),
    "max_brightness": (
        measured(brightness=0.99),
        "too_bright",
        "brightness 0.99, expected at most 0.92",
    ),
    "max_clipped": (measured(clipped=0.5), "clipped", "clipped share 0.5, expected at most 0.25"),
    "max_yaw": (measured(yaw=-75.0), "turned_away", "yaw in degrees 75, expected at most 60"),
    "max_pitch": (measured(pitch=-41.0), "nodding", "pitch in degrees 41, expected at most 40"),
    "max_roll": (measured(roll=100.0), "tilted", "roll in degrees 100, expected at most 35"),
    "max_occlusion": (
        measured(occlusion=0.204),
        "occluded",
        "occlusion 0.204, expected at most 0.2",
    ),
    "min_identity_norm": (
        Facts(identity_norm=3.0),
        "weak_identity",
        "identity norm 3, expected at least 12",
    ),
}


def test_a_good_record_breaks_no_rule_and_an_unmeasured_one_none_on_measures() -> None:
    assert verdict(Facts(), RulesConfig()) is None
    assert (
        verdict(
            Facts(measures=None, identity_norm=None, source_width=0, source_height=0), RulesConfig()
        )
        is None
    )


def test_every_limit_of_the_configuration_is_a_rule() -> None:
    assert [rule.setting for rule in RULES] == [
        f.name for f in fields(RulesConfig) if f.name != "placement"
    ]
    assert {rule.setting for rule in RULES} == set(BROKEN)


@pytest.mark.parametrize("setting", BROKEN)
def test_each_rule_names_its_reason_and_what_it_found(setting: str) -> None:
    facts, reason, detail = BROKEN[setting]
    assert verdict(facts, RulesConfig()) == (reason, detail)


def test_a_passer_by_is_no_second_person() -> None:
    far, near = (replace(FACE, box=(0.0, 0.0, side, side)) for side in (30.0, 40.0))
    assert verdict(Facts(faces=(FACE, far)), RulesConfig()) is None
    assert verdict(Facts(faces=(FACE, near)), RulesConfig()) == (
        "too_many_faces",
        "faces 2, expected at most 1",
    )


@pytest.mark.parametrize("setting", BROKEN)
def test_each_rule_is_off_at_0(setting: str) -> None:
    facts, _, _ = BROKEN[setting]
    assert verdict(facts, replace(RulesConfig(), **{setting: 0})) is None


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.setting)
def test_a_figure_at_its_limit_is_kept(rule: Rule) -> None:
    facts = measured(clipped=0.1, occlusion=0.1)
    figure = rule.figure(facts)
    assert figure, "a limit of 0 would switch the rule off"
    settings = {"min_brightness": 0.0, "max_brightness": 0.0, rule.setting: figure}
    assert verdict(facts, replace(RulesConfig(), **settings)) is None  # type: ignore[arg-type]


def test_the_first_rule_in_the_table_names_the_reason() -> None:
    facts = replace(measured(sharpness=0.0, brightness=0.0, yaw=90.0), source_width=10)
    assert verdict(facts, RulesConfig()) == (
        "low_resolution",
        "short side in pixels 10, expected at least 256",
    )
    assert (verdict(facts, RulesConfig(min_side=0)) or ("",))[0] == "blurred"
    assert (verdict(facts, RulesConfig(min_side=0, min_sharpness=0)) or ("",))[0] == "too_dark"


def test_a_figure_that_is_no_number_is_no_pass() -> None:
    assert (verdict(measured(sharpness=float("nan")), RulesConfig()) or ("",))[0] == "blurred"


@pytest.mark.parametrize(
    "settings",
    [
        {"min_side": -1},
        {"min_sharpness": 1.5},
        {"max_yaw": 200},
        {"max_occlusion": -0.1},
        {"min_faces": 3, "max_faces": 2},
        {"min_brightness": 0.9, "max_brightness": 0.5},
    ],
)
def test_impossible_rules_are_refused_when_given(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        RulesConfig(**settings)  # type: ignore[arg-type]
