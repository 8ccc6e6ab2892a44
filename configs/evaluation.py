"""Settings of the evaluation of an adapter. Presets are in configs/evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from configs.common import check as _check
from configs.portraits import InferConfig

MEASURES: Final = (
    "losses",
    "portraits",
    "calibration",
    "regions",
    "attention",
    "texts",
    "copying",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """The settings of `python -m infer.evaluation run`."""

    data: str = ""  # a data set
    output: str = ""  # file for the results, JSON
    measures: tuple[str, ...] = MEASURES
    split: Literal["val", "train", "all"] = "val"  # the side of the data set's split
    people: int = 50
    images: int = 4  # portraits of each person
    prompt: str = "A portrait of a person."
    # people whose regions are exchanged, and for whom prompts say glasses, hair and smile
    region_people: int = 12
    text_people: int = 12
    seed: int = 1
    # how portraits are made, of which adapter; photo, prompts, output and seed have no effect
    portraits: InferConfig = field(default_factory=InferConfig)

    def __post_init__(self) -> None:
        unknown = [name for name in self.measures if name not in MEASURES]
        _check(
            not unknown, f"measures: {', '.join(unknown)}: expected some of {', '.join(MEASURES)}"
        )
        for name in ("people", "region_people", "text_people"):
            _check(getattr(self, name) > 1, f"{name}={getattr(self, name)}: expected at least 2")
        _check(self.images > 0, f"images={self.images}: expected at least 1")
