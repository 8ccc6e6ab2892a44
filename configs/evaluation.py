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
    "sheet",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """The settings of `python -m infer.evaluation run`."""

    data: str = ""  # a data set
    output: str = ""  # file for the results, JSON
    measures: tuple[str, ...] = MEASURES
    split: Literal["val", "train", "all"] = "val"  # the side of the data set's split
    people: int = 50  # 0: all of that side
    images: int = 4  # portraits of each person
    prompt: str = "A portrait of a person."
    # people whose regions are exchanged, and for whom prompts say glasses, hair and smile
    region_people: int = 12
    text_people: int = 12
    # the contact sheet: for so many people, portraits of each of `portraits.prompts`, else of
    # `prompt`
    sheet_people: int = 3
    sheet_images: int = 2
    seed: int = 1
    # how portraits are made, of which adapter; photo, output and seed have no effect
    portraits: InferConfig = field(default_factory=InferConfig)

    def __post_init__(self) -> None:
        unknown = [name for name in self.measures if name not in MEASURES]
        _check(
            not unknown, f"measures: {', '.join(unknown)}: expected some of {', '.join(MEASURES)}"
        )
        _check(self.people != 1, "people=1: expected at least 2, or 0 for all")
        for name in ("region_people", "text_people"):
            _check(getattr(self, name) > 1, f"{name}={getattr(self, name)}: expected at least 2")
        for name in ("images", "sheet_people", "sheet_images"):
            _check(getattr(self, name) > 0, f"{name}={getattr(self, name)}: expected at least 1")
