"""A person without a photograph: the record that the stages would have made of one."""

from __future__ import annotations

import io
from typing import Final

import numpy as np
from PIL import Image

from stages.codec import encode_labels
from stages.record import IDENTITY_DIM, Face, Record, key_of

_SIDE: Final = 512
_PARTS: Final = {  # label → (top, bottom, left, right), in sixteenths of the image
    1: (3, 14, 4, 12),  # skin
    4: (6, 7, 9, 11),  # eyes
    5: (6, 7, 5, 7),
    7: (6, 9, 12, 13),  # ears
    8: (6, 9, 3, 4),
    10: (7, 10, 7, 9),  # nose
    12: (11, 12, 6, 10),  # lips
    13: (12, 13, 6, 10),
}
_FACE: Final = Face(
    box=(96.0, 64.0, 416.0, 480.0),
    landmarks=((192.0, 208.0), (320.0, 208.0), (256.0, 290.0), (210.0, 380.0), (302.0, 380.0)),
    score=0.9,
)


def synthetic_person() -> Record:
    """Returns a record with noise as the image, a label map of boxes, and a random embedding."""
    rng = np.random.default_rng(0)
    labels = np.zeros((_SIDE, _SIDE), np.uint8)
    for label, box in _PARTS.items():
        top, bottom, left, right = (side * _SIDE // 16 for side in box)
        labels[top:bottom, left:right] = label
    pixels = rng.integers(0, 256, (_SIDE // 16, _SIDE // 16, 3), np.uint8)
    image = Image.fromarray(pixels).resize((_SIDE, _SIDE))
    with io.BytesIO() as file:
        image.save(file, "JPEG")
        data = file.getvalue()
    identity = rng.standard_normal(IDENTITY_DIM).astype(np.float32)
    return Record(
        key=key_of("synthetic"),
        source="synthetic",
        image=data,
        width=_SIDE,
        height=_SIDE,
        parsing=encode_labels(labels),
        identity=identity / np.linalg.norm(identity),
        faces=(_FACE,),
        face=0,
    )
