"""Quality filter: drops samples by rules on recorded metrics. It reads no image and runs no model.

A rule is a row of RULES; the first one that a record breaks gives the reason. A dropped record
stays complete (quarantined), so that changed rules can restore it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from configs.quality import RulesConfig
from stages.annotations import Measures
from stages.base import Dropped, RecordStage, quarantine
from stages.record import Record

_BACKGROUND_FACE: Final = 1 / 3


@dataclass(frozen=True, slots=True)
class Rule:
    """A limit on a metric.

    setting: the limit's name in RulesConfig; its prefix, min or max, says which side is allowed.
    label: the metric's name in the detail. metric: its name in the report and `inspect`. value: the
    metric of a record, None where it was not measured.
    """

    setting: str
    reason: str
    label: str
    metric: str
    value: Callable[[Record], float | None]

    @property
    def is_minimum(self) -> bool:
        return self.setting.startswith("min_")

    def broken_by(self, value: float, limit: float) -> bool:
        """True if the value is on the wrong side of a limit. A limit of 0 switches the rule off."""
        within = value >= limit if self.is_minimum else value <= limit  # false for NaN
        return bool(limit) and not within

    def detail(self, record: Record, rules: RulesConfig) -> str:
        """How the record breaks the rule; "" where it doesn't, or has no such metric."""
        limit, value = getattr(rules, self.setting), self.value(record)
        if value is None or not self.broken_by(value, limit):
            return ""
        # never "0.22, expected at least 0.22"
        digits = 3 if round(value, 2) == round(limit, 2) else 2
        shown = value if isinstance(value, int) else round(value, digits)
        side = "least" if self.is_minimum else "most"
        return f"{self.label} {shown:g}, expected at {side} {limit:g}"


class QualityFilterStage(RecordStage):
    name = "quality_filter"
    version = 1
    requires = (
        *("image", "parsing", "faces", "face", "identity", "identity_norm", "source_width"),
        Measures.name,
    )
    config: RulesConfig

    def process_one(self, record: Record) -> Record:
        broken = broken_rule(record, self.config)
        return quarantine(record, Dropped(*broken), self.name) if broken else record


def broken_rule(record: Record, rules: RulesConfig) -> tuple[str, str] | None:
    """(reason, detail) of the first rule that the record breaks; None if it breaks none."""
    for rule in RULES:
        if detail := rule.detail(record, rules):
            return rule.reason, detail
    return None


def _source_side(record: Record) -> float | None:
    return min(record.source_width, record.source_height) or None


def _large_faces(record: Record) -> int:
    """Returns the number of faces whose side is at least a third of the main face's: people in the
    background don't count.
    """
    return sum(face.side >= record.main_face.side * _BACKGROUND_FACE for face in record.faces)


def _measured(setting: str, reason: str, label: str, metric: str) -> Rule:
    """A rule on a field of Measures, without its sign: turned left counts as turned right."""

    def value(record: Record) -> float | None:
        measures = record.annotation(Measures)
        return None if measures is None else abs(float(getattr(measures, metric)))

    return Rule(setting, reason, label, metric, value)


RULES: Final = (
    Rule("min_side", "low_resolution", "short side in pixels", "source_side", _source_side),
    Rule("max_faces", "too_many_faces", "faces", "face_count", _large_faces),
    Rule("min_faces", "too_few_faces", "faces", "face_count", lambda record: len(record.faces)),
    Rule(
        "min_face",
        "face_too_small",
        "face in pixels",
        "face_side",
        lambda r: r.main_face.side if r.faces else None,
    ),
    Rule(
        "min_score",
        "low_score",
        "detection score",
        "score",
        lambda r: r.main_face.score if r.faces else None,
    ),
    _measured("min_sharpness", "blurred", "sharpness", "sharpness"),
    _measured("min_brightness", "too_dark", "brightness", "brightness"),
    _measured("max_brightness", "too_bright", "brightness", "brightness"),
    _measured("max_clipped", "clipped", "clipped share", "clipped"),
    _measured("max_yaw", "turned_away", "yaw in degrees", "yaw"),
    _measured("max_pitch", "nodding", "pitch in degrees", "pitch"),
    _measured("max_roll", "tilted", "roll in degrees", "roll"),
    _measured("max_occlusion", "occluded", "occlusion", "occlusion"),
    Rule(
        "min_identity_norm",
        "weak_identity",
        "identity norm",
        "identity_norm",
        lambda record: record.identity_norm,
    ),
)
