"""The quality filter: each rule's reason and detail, its limit, and that 0 switches it off."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from configs.errors import ConfigError
from configs.quality import RulesConfig
from stages.annotations import Measures
from stages.quality_filter import RULES, Rule, broken_rule
from stages.record import Face, Record

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
WITHOUT_MEASURES = Record(
    key="0" * 20,
    source="a.jpg",
    source_width=800,
    source_height=600,
    faces=(FACE,),
    face=0,
    identity_norm=20.0,
)
RECORD = WITHOUT_MEASURES.annotated(FINE)


def measured(**values: float) -> Record:
    return RECORD.annotated(replace(FINE, **values))  # type: ignore[arg-type]


BROKEN = {
    "min_side": (
        replace(RECORD, source_width=90),
        "low_resolution",
        "short side in pixels 90, expected at least 256",
    ),
    "max_faces": (
        replace(RECORD, faces=(FACE, FACE)),
        "too_many_faces",
        "faces 2, expected at most 1",
    ),
    "min_faces": (replace(RECORD, faces=()), "too_few_faces", "faces 0, expected at least 1"),
    "min_face": (
        replace(RECORD, faces=(replace(FACE, box=(100.0, 100.0, 150.5, 220.0)),)),
        "face_too_small",
        "face in pixels 50.5, expected at least 64",
    ),
    "min_score": (
        replace(RECORD, faces=(replace(FACE, score=0.4),)),
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
        replace(RECORD, identity_norm=3.0),
        "weak_identity",
        "identity norm 3, expected at least 12",
    ),
}


def test_a_good_record_and_one_without_metrics_break_no_rule() -> None:
    assert broken_rule(RECORD, RulesConfig()) is None
    unmeasured = replace(WITHOUT_MEASURES, identity_norm=None, source_width=0, source_height=0)
    assert broken_rule(unmeasured, RulesConfig()) is None


def test_every_limit_of_the_configuration_is_a_rule() -> None:
    assert [rule.setting for rule in RULES] == [
        f.name for f in fields(RulesConfig) if f.name != "placement"
    ]
    assert {rule.setting for rule in RULES} == set(BROKEN)


@pytest.mark.parametrize("setting", BROKEN)
def test_each_rule_gives_its_reason_and_both_numbers(setting: str) -> None:
    record, reason, detail = BROKEN[setting]
    assert broken_rule(record, RulesConfig()) == (reason, detail)


def test_a_small_face_in_the_background_does_not_count() -> None:
    far, near = (replace(FACE, box=(0.0, 0.0, side, side)) for side in (30.0, 40.0))
    assert broken_rule(replace(RECORD, faces=(FACE, far)), RulesConfig()) is None
    assert broken_rule(replace(RECORD, faces=(FACE, near)), RulesConfig()) == (
        "too_many_faces",
        "faces 2, expected at most 1",
    )


@pytest.mark.parametrize("setting", BROKEN)
def test_each_rule_is_off_at_0(setting: str) -> None:
    record, _, _ = BROKEN[setting]
    assert broken_rule(record, replace(RulesConfig(), **{setting: 0})) is None


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.setting)
def test_a_metric_at_its_limit_passes(rule: Rule) -> None:
    record = measured(clipped=0.1, occlusion=0.1)
    value = rule.value(record)
    assert value, "a limit of 0 would switch the rule off"
    settings = {"min_brightness": 0.0, "max_brightness": 0.0, rule.setting: value}
    assert broken_rule(record, replace(RulesConfig(), **settings)) is None  # type: ignore[arg-type]


def test_the_first_rule_in_the_table_names_the_reason() -> None:
    record = replace(measured(sharpness=0.0, brightness=0.0, yaw=90.0), source_width=10)
    assert broken_rule(record, RulesConfig()) == (
        "low_resolution",
        "short side in pixels 10, expected at least 256",
    )
    assert (broken_rule(record, RulesConfig(min_side=0)) or ("",))[0] == "blurred"
    assert (broken_rule(record, RulesConfig(min_side=0, min_sharpness=0)) or ("",))[0] == "too_dark"


def test_a_metric_that_is_not_a_number_breaks_its_rule() -> None:
    """Data sets of version 2 may have one."""
    values = {**RECORD.annotations["measures"], "sharpness": float("nan")}
    record = replace(RECORD, annotations={"measures": values})
    assert (broken_rule(record, RulesConfig()) or ("",))[0] == "blurred"


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
def test_impossible_limits_are_configuration_errors(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        RulesConfig(**settings)  # type: ignore[arg-type]
