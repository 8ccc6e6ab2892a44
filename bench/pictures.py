"""Photographs that come with scikit-image."""

from __future__ import annotations

from typing import Final

import cv2
from skimage.data import astronaut, cat, coffee, rocket

from stages.codec import encode_jpeg
from stages.record import Record, key_of

SIDE: Final = 512  # pixels


def pictures(count: int) -> list[Record]:
    """Returns `count` different pictures of 512 × 512."""
    photographs = [
        cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        for image in (astronaut(), cat(), coffee(), rocket())
    ]
    images = [
        encode_jpeg(photographs[n % 4][:: (-1) ** (n // 4), :, :] // (1 + n // 8), 95)
        for n in range(count)
    ]
    return [
        Record(key=key_of(str(n)), source=str(n), image=image) for n, image in enumerate(images)
    ]
