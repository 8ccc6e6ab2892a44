"""Embed: the ArcFace identity of the chosen face. There is no silent substitute: no embedding, no sample."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from configs.schema import EmbedConfig
from stages.base import BackendStage, Failed, reject
from stages.codec import decode_jpeg
from stages.record import IDENTITY_DIM, FloatArray, Record


class EmbedStage(BackendStage):
    name = "embed"
    version = 1
    requires = ("image", "faces", "face")
    provides = ("identity",)
    config: EmbedConfig

    def process(self, records: list[Record]) -> list[Record]:
        images = [decode_jpeg(record.image) for record in records]
        identities = self.backend.embed(images, [record.main_face for record in records])
        return [self._answer(record, identity) for record, identity in zip(records, identities, strict=True)]

    def _answer(self, record: Record, identity: FloatArray) -> Record:
        norm = float(np.linalg.norm(identity))
        if identity.shape != (IDENTITY_DIM,) or not abs(norm - 1) < 1e-3:
            return reject(record, Failed("no_identity", f"shape {identity.shape}, norm {norm:.4f}"), self.name)
        return replace(record, identity=identity)
