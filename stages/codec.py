"""Pixels ⇄ bytes, and a Record ⇄ the members of its sample in a shard, side by side.

Decoding the record's JPEG is remembered for a few pictures, since four stages in one process each
ask for it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg

from stages.record import (
    SCHEMA_VERSION,
    Measures,
    Record,
    Status,
    face_from_dict,
    face_to_dict,
    review_from_dict,
    review_to_dict,
)

Image = npt.NDArray[np.uint8]  # RGB (H, W, 3)
LabelMap = npt.NDArray[np.uint8]  # (H, W)

LONG_SIDE: Final = 96  # pixels, of thumbnails
_REMEMBERED: Final = 2**21  # pixels; of larger pictures a few would fill the memory
_PLAIN: Final = (
    *(
        "key",
        "source",
        "sha256",
        "license",
        "author",
        "consent",
        "width",
        "height",
        "source_width",
        "source_height",
    ),
    *("face", "identity_norm", "caption", "face_caption"),
)
MEMBERS = ("identity.npy", "jpg", "json", "parsing.png", "txt")


def encode_jpeg(image: Image, quality: int) -> bytes:
    """RGB (H, W, 3) uint8 → JPEG without chroma subsampling."""
    data: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=quality, colorspace="RGB", colorsubsampling="444"
    )
    return data


def decode_jpeg(data: bytes) -> Image:
    """JPEG → RGB (H, W, 3) uint8, read-only. Raises ValueError on anything else."""
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    return _remembered(data) if height * width <= _REMEMBERED else _decode_jpeg(data)


def _decode_jpeg(data: bytes) -> Image:
    image: Image = simplejpeg.decode_jpeg(data, colorspace="RGB")
    image.setflags(write=False)
    return image


_remembered = lru_cache(maxsize=24)(_decode_jpeg)


def encode_labels(labels: LabelMap) -> bytes:
    """Label map (H, W) uint8 → single-channel PNG. Level 1: label maps pack well at any level."""
    done, data = cv2.imencode(".png", labels, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    assert done, "OpenCV encodes any uint8 array"
    return data.tobytes()


@lru_cache(maxsize=24)
def decode_labels(data: bytes) -> LabelMap:
    """PNG → label map (H, W) uint8, read-only. Raises ValueError unless it is a single-channel
    8-bit picture.
    """
    labels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    if labels is None or labels.ndim != 2 or labels.dtype != np.uint8:
        raise ValueError("a label map must be a single-channel 8-bit PNG")
    labels.setflags(write=False)
    return np.asarray(labels, np.uint8)


def shrink(pixels: Image | LabelMap, long_side: int) -> Image | LabelMap:
    """Scales pixels (H, W, 3) by area, or labels (H, W) by the nearest label, to at most
    `long_side` pixels on the long side. Never enlarges.

    An image and a label map of equal size keep equal sizes, so that one can be laid over the other.
    """
    height, width = pixels.shape[:2]
    scale = long_side / max(height, width)
    if scale >= 1:
        return pixels
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # plain NEAREST is half a pixel off
    method = cv2.INTER_AREA if pixels.ndim == 3 else cv2.INTER_NEAREST_EXACT
    return np.asarray(cv2.resize(pixels, size, interpolation=method), np.uint8)


def to_members(record: Record) -> dict[str, bytes]:
    """extension → bytes of a whole record, in the order they are written. Raises ValueError if it
    is incomplete.
    """
    if (
        not (record.ok or record.quarantined)
        or record.identity is None
        or not record.image
        or not record.parsing
    ):
        raise ValueError(
            f"record {record.key} ({record.source}) is not a whole sample: status {record.status}"
        )
    meta: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        **{name: getattr(record, name) for name in _PLAIN},
        "faces": [face_to_dict(face) for face in record.faces],
        "measures": None if record.measures is None else asdict(record.measures),
        "review": None if record.review is None else review_to_dict(record.review),
    }
    identity = io.BytesIO()
    np.save(identity, np.asarray(record.identity, np.float32), allow_pickle=False)
    return {
        "identity.npy": identity.getvalue(),
        "jpg": record.image,
        "json": json.dumps(meta, ensure_ascii=False, sort_keys=True).encode(),
        "parsing.png": record.parsing,
        "txt": record.caption.encode(),
    }


def from_members(members: Mapping[str, bytes]) -> Record:
    """The record of a sample's members, ok. Raises KeyError on a missing member, ValueError on
    another schema.
    """
    meta = json.loads(members["json"])
    if meta["schema"] != SCHEMA_VERSION:
        raise ValueError(
            f"sample {meta.get('key')}: schema {meta['schema']}, this program reads "
            f"{SCHEMA_VERSION}"
        )
    identity = np.load(io.BytesIO(members["identity.npy"]), allow_pickle=False)
    return Record(
        image=members["jpg"],
        faces=tuple(face_from_dict(face) for face in meta["faces"]),
        parsing=members["parsing.png"],
        identity=np.asarray(identity, np.float32),
        measures=None if meta["measures"] is None else Measures(**meta["measures"]),
        review=None if meta["review"] is None else review_from_dict(meta["review"]),
        status=Status.OK,
        **{name: meta[name] for name in _PLAIN},
    )
