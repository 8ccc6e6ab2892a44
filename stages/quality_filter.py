"""Quality filter: the rules on recorded metrics. Nothing is measured here, so a changed rule needs
no image and no model.

A rule is a row of RULES. The first that a record breaks names the reason. What is dropped is held
whole, so that other rules take it back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from configs.quality import RulesConfig
from stages.base import Dropped, RecordStage, quarantine
from stages.record import Record

_PASSER_BY: Final = 1 / 3


@dataclass(frozen=True, slots=True)
class Rule:
    """`setting` names the limit in RulesConfig; its prefix, min or max, says on which side of it a
    figure is broken.
    """

    setting: str
    reason: str
    what: str  # the figure's name in the detail
    figure: Callable[[Record], float | None]  # None: not measured

    def broken(self, record: Record, rules: RulesConfig) -> str:
        """What was found and what was expected; "" where the rule is kept, switched off or has
        nothing to look at.
        """
        limit, figure = getattr(rules, self.setting), self.figure(record)
        if not limit or figure is None:
            return ""
        at_least = self.setting.startswith("min_")
        if figure >= limit if at_least else figure <= limit:
            return ""
        # never "0.22, expected at least 0.22"
        digits = 3 if round(figure, 2) == round(limit, 2) else 2
        found = figure if isinstance(figure, int) else round(figure, digits)
        return f"{self.what} {found:g}, expected at {'least' if at_least else 'most'} {limit:g}"


class QualityFilterStage(RecordStage):
    name = "quality_filter"
    introduced_as = "judge"
    version = 1
    requires = (
        "image",
        "parsing",
        "faces",
        "face",
        "identity",
        "identity_norm",
        "measures",
        "source_width",
    )
    config: RulesConfig

    def process_one(self, record: Record) -> Record:
        found = verdict(record, self.config)
        return quarantine(record, Dropped(*found), self.name) if found else record


def verdict(record: Record, rules: RulesConfig) -> tuple[str, str] | None:
    """(reason, detail) of the first rule that the record breaks; None where it keeps them all."""
    for rule in RULES:
        if detail := rule.broken(record, rules):
            return rule.reason, detail
    return None


def _side(record: Record) -> float | None:
    return min(record.source_width, record.source_height) or None


def _large_faces(record: Record) -> int:
    """Faces that a picture may be about: a passer-by far behind has a side under a third of the
    chosen face's.
    """
    return sum(face.side >= record.main_face.side * _PASSER_BY for face in record.faces)


def _of(name: str) -> Callable[[Record], float | None]:
    """A figure of the measures, without its sign: turned left is as bad as turned right."""
    return lambda record: (
        None if record.measures is None else abs(float(getattr(record.measures, name)))
    )


RULES: Final = (
    Rule("min_side", "low_resolution", "short side in pixels", _side),
    Rule("max_faces", "too_many_faces", "faces", _large_faces),
    Rule("min_faces", "too_few_faces", "faces", lambda record: len(record.faces)),
    Rule("min_face", "face_too_small", "face in pixels", lambda record: record.main_face.side),
    Rule("min_score", "low_score", "detection score", lambda record: record.main_face.score),
    Rule("min_sharpness", "blurred", "sharpness", _of("sharpness")),
    Rule("min_brightness", "too_dark", "brightness", _of("brightness")),
    Rule("max_brightness", "too_bright", "brightness", _of("brightness")),
    Rule("max_clipped", "clipped", "clipped share", _of("clipped")),
    Rule("max_yaw", "turned_away", "yaw in degrees", _of("yaw")),
    Rule("max_pitch", "nodding", "pitch in degrees", _of("pitch")),
    Rule("max_roll", "tilted", "roll in degrees", _of("roll")),
    Rule("max_occlusion", "occluded", "occlusion", _of("occlusion")),
    Rule(
        "min_identity_norm", "weak_identity", "identity norm", lambda record: record.identity_norm
    ),
)
