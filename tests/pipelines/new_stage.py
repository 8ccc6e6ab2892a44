"""An example of a new stage: annotation, settings and stage in one file.

tests/pipelines/test_new_stage.py adds it to a chain and checks where its fields are shown.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
import pyarrow as pa

from configs.common import NOT_HASHED, PlacementConfig
from configs.schema import DatasetConfig
from pipelines.chain import build_chain
from stages.backends.colors import to_lab
from stages.backends.weights import Weights
from stages.base import RecordStage, Stage, introduced_name
from stages.caption import CaptionStage
from stages.codec import decode_jpeg, decode_labels
from stages.fields import Annotation, Metric, stored
from stages.record import Record
from stages.regions import LABEL_IDS
from stages.storage import layout

DATASET_V2: Final = Path("tests/data/dataset_v2")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleToneConfig:
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NOT_HASHED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleTone(Annotation):
    name: ClassVar[str] = "example_tone"

    example_lightness: float = stored(
        "median CIE L* of the main face's skin, 0 (black) to 100 (white)",
        pa.float64(),
        metric=Metric(title="Example lightness", unit="L*"),
    )
    example_shade: str = stored("light if that is over 50, else dark", pa.string())


class ExampleToneStage(RecordStage):
    name = "example_tone"
    version = 1
    requires = ("image", "faces", "parsing")
    provides = (ExampleTone.name,)
    annotation = ExampleTone
    config: ExampleToneConfig

    def process_one(self, record: Record) -> Record:
        left, top, right, bottom = (max(0, round(value)) for value in record.main_face.box)
        face = slice(top, bottom), slice(left, right)
        skin = decode_labels(record.parsing)[face] == LABEL_IDS["skin"]
        if not skin.any():
            return record  # nothing to record
        lightness = float(np.median(to_lab(decode_jpeg(record.image)[face])[skin, 0]))
        shade = "light" if lightness > 50 else "dark"
        return record.annotated(ExampleTone(example_lightness=lightness, example_shade=shade))


class CaptionStageOfVersion2(CaptionStage):
    """Has the signature of the captions in the data set: the rules of `attributes` were changed
    since.
    """

    def digests(self) -> dict[str, str]:
        return {}


def chain_of_version_2(config: DatasetConfig) -> list[Stage]:
    """Returns the chain for which the data set of version 2 is complete."""
    return [
        CaptionStageOfVersion2(config.caption, Weights(config.weights))
        if stage.name == "caption"
        else stage
        for stage in chain_since_version_2(config)
    ]


def chain_since_version_2(config: DatasetConfig) -> list[Stage]:
    """Returns the pipeline's chain without stages that were added after version 2."""
    names = json.loads((DATASET_V2 / layout.DATASET).read_text())["stages"]
    return [stage for stage in build_chain(config) if introduced_name(stage.name) in names]


def chain_with_example(config: DatasetConfig) -> list[Stage]:
    """Returns the chain of version 2 with the new stage before the quality filter."""
    chain = chain_of_version_2(config)
    place = [stage.name for stage in chain].index("quality_filter")
    return [*chain[:place], ExampleToneStage(ExampleToneConfig()), *chain[place:]]
