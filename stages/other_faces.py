"""Other faces: computes the embeddings of all detected faces except the main one.

They are compared when somebody asks to be removed, since a picture can show a person beside its
main face. They describe people whom the sample isn't about, so only the sidecar has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from configs.schema import EmbedConfig
from stages.base import BackendStage
from stages.codec import decode_jpeg
from stages.record import IDENTITY_DIM, Face, FloatArray, Record


class OtherFacesStage(BackendStage):
    """It has the backend, the weights and the settings of `embed`, so that both embeddings can be
    compared.
    """

    name = "other_faces"
    role = "embed"
    version = 1
    requires = ("image", "faces", "face")
    provides = ("other_identities",)
    config: EmbedConfig

    def process(self, records: list[Record]) -> list[Record]:
        return [replace(record, other_identities=self._embed(record)) for record in records]

    def _embed(self, record: Record) -> FloatArray:
        """Returns float32[F * 512]: a unit vector for each of the F other faces, in their order;
        zeros where the network gave no usable vector.

        The faces of different records never share a batch, so that the result doesn't depend on
        which records are processed together.
        """
        faces = record.other_faces
        vectors = np.zeros((len(faces), IDENTITY_DIM), np.float32)
        image = decode_jpeg(record.image) if faces else None
        for start in range(0, len(faces), self.batch_size):
            part: Sequence[Face] = faces[start : start + self.batch_size]
            features = self.backend.embed([image] * len(part), part)
            for place, feature in zip(range(start, start + len(part)), features, strict=True):
                norm = float(np.linalg.norm(feature))
                if feature.shape == (IDENTITY_DIM,) and 1e-6 < norm < np.inf:
                    vectors[place] = feature / np.float32(norm)
        return vectors.reshape(-1)
