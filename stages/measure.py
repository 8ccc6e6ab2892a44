"""Measure: computes the metrics that the quality rules use; no model is needed."""

from __future__ import annotations

from dataclasses import replace

from configs.quality import MeasureConfig
from stages.base import RecordStage
from stages.codec import decode_jpeg, decode_labels
from stages.measurements import measure
from stages.record import Record


class MeasureStage(RecordStage):
    name = "measure"
    version = 1
    requires = ("image", "parsing", "faces", "face")
    provides = ("measures",)
    config: MeasureConfig

    def process_one(self, record: Record) -> Record:
        image, labels = decode_jpeg(record.image), decode_labels(record.parsing)
        return replace(record, measures=measure(image, labels, record.main_face))
