"""An example of a new stage: annotation, settings and stage in one file.

tests/pipelines/test_new_stage.py adds it to a chain and checks that its metric is shown everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import cv2
import numpy as np
import pyarrow as pa

from configs.common import NOT_HASHED, PlacementConfig
from configs.schema import DatasetConfig
from pipelines.chain import build_chain
from stages.base import RecordStage, Stage
from stages.codec import decode_jpeg, decode_labels
from stages.fields import Annotation, Metric, stored
from stages.record import Record
from stages.regions import LABEL_IDS


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleToneConfig:
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NOT_HASHED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleTone(Annotation):
    name: ClassVar[str] = "example_tone"

    example_lightness: float = stored(
        "median CIE L* of the face's skin, 0 (black) to 100 (white)",
        pa.float64(),
        metric=Metric(title="Example lightness", unit="L*"),
    )


class ExampleToneStage(RecordStage):
    name = "example_tone"
    requires = ("image", "parsing")
    provides = (ExampleTone.name,)
    annotation = ExampleTone
    config: ExampleToneConfig

    def process_one(self, record: Record) -> Record:
        skin = decode_labels(record.parsing) == LABEL_IDS["skin"]
        pixels = decode_jpeg(record.image)[skin].astype(np.float32) / 255
        lightness = cv2.cvtColor(pixels[None], cv2.COLOR_RGB2LAB)[0, :, 0]
        return record.annotated(ExampleTone(example_lightness=float(np.median(lightness))))


def chain_with_example(config: DatasetConfig) -> list[Stage]:
    """Returns the pipeline's chain with the new stage before the quality filter."""
    chain = build_chain(config)
    place = [stage.name for stage in chain].index("quality_filter")
    return [*chain[:place], ExampleToneStage(ExampleToneConfig()), *chain[place:]]
