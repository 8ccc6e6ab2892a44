"""Measure: records the metrics that the quality filter looks at. No network runs."""

from __future__ import annotations

from configs.quality import MeasureConfig
from stages.annotations import Measures
from stages.base import RecordStage
from stages.codec import decode_jpeg, decode_labels
from stages.measurements import measure
from stages.record import Record


class MeasureStage(RecordStage):
    name = "measure"
    version = 1
    requires = ("image", "parsing", "faces", "face")
    provides = (Measures.name,)
    annotation = Measures
    config: MeasureConfig

    def process_one(self, record: Record) -> Record:
        image, labels = decode_jpeg(record.image), decode_labels(record.parsing)
        return record.annotated(measure(image, labels, record.main_face))
