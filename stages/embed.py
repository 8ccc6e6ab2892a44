"""Embed: computes the ArcFace identity of the main face.

A record without an embedding fails; an embedding of zeros is never used instead.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from configs.schema import EmbedConfig
from stages.base import BackendStage, Failed, reject
from stages.codec import decode_jpeg
from stages.record import IDENTITY_DIM, FloatArray, Record


class EmbedStage(BackendStage):
    name = "embed"
    version = 2
    requires = ("image", "faces", "face")
    provides = ("identity", "identity_norm")
    config: EmbedConfig

    def process(self, records: list[Record]) -> list[Record]:
        images = [decode_jpeg(record.image) for record in records]
        features = self.backend.embed(images, [record.main_face for record in records])
        return [
            with_identity(record, feature)
            for record, feature in zip(records, features, strict=True)
        ]


def with_identity(record: Record, feature: FloatArray) -> Record:
    """Returns the record with the identity of the network's output, or failed if that is none."""
    norm = float(np.linalg.norm(feature))
    if feature.shape != (IDENTITY_DIM,) or not 1e-6 < norm < np.inf:
        failure = Failed("no_identity", f"shape {feature.shape}, norm {norm:.4f}")
        return reject(record, failure, EmbedStage.name)
    identity = np.asarray(feature / np.float32(norm), np.float32)
    return replace(record, identity=identity, identity_norm=round(norm, 6))
