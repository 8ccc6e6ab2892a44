"""Contact sheet: a few samples, spread evenly over the shards, as thumbnails with their parsing in colours.

Photograph and label map are made smaller by the same factor, so the overlay lies on its pixel. A sample is read from
its tar by offset: no shard is read whole.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
from PIL import Image as PILImage

from configs.errors import ShardError
from pipelines.shards import FOLDER, read_sample, read_sidecar
from pipelines.store import Store
from stages.backends.protocols import Image, LabelMap
from stages.codec import decode_jpeg, decode_labels, encode_jpeg
from stages.record import Face, Record, Status

MAX_SAMPLES = 48
THUMBNAIL = 256  # long side, pixels
_QUALITY = 82

# One colour for each of LABELS; sides of a pair differ, to show that left is left. The background is transparent.
PALETTE: Final = (
    "#000000",  # background
    "#35b3a2",  # skin
    "#f7d154",  # left_brow
    "#c9930a",  # right_brow
    "#1f5fd6",  # left_eye
    "#7cc0ff",  # right_eye
    "#9b5de5",  # glasses
    "#ff9eb5",  # left_ear
    "#e0557d",  # right_ear
    "#f4f1bb",  # earring
    "#f4873a",  # nose
    "#5e0b2b",  # mouth
    "#e63946",  # upper_lip
    "#b5179e",  # lower_lip
    "#8ac926",  # neck
    "#fff275",  # necklace
    "#4a5fc1",  # cloth
    "#8b5a9f",  # hair
    "#8d6e63",  # hat
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One card. photo, overlay: data URIs of equal size; width, height: of the sample's own image, as are the faces."""

    key: str
    shard: str
    source: str
    license: str
    author: str
    width: int
    height: int
    faces: tuple[Face, ...]
    face: int
    caption: str
    face_caption: str
    photo: str
    overlay: str


def contact_sheet(store: Store, shards: Sequence[Mapping[str, Any]], count: int = MAX_SAMPLES) -> list[Sample]:
    """At most `count` written samples; `shards` are rows of the stats' shard table. Raises ShardError."""
    samples = []
    for row, positions in _chosen(shards, count):
        index = int(row["shard"].rpartition("-")[2])
        written = [found for found in read_sidecar(store, index).to_pylist() if found["status"] == Status.OK]
        samples += [_sample(_read(store, row["shard"], written[position]), row["shard"]) for position in positions]
    return samples


def _chosen(shards: Sequence[Mapping[str, Any]], count: int) -> Iterator[tuple[Mapping[str, Any], list[int]]]:
    """(shard, positions among its written samples): the middles of `count` equal parts of all written samples."""
    total = sum(shard["written"] for shard in shards)
    parts = min(count, total)
    wanted = [(2 * part + 1) * total // (2 * parts) for part in range(parts)]
    first = 0
    for shard in shards:
        positions = [position - first for position in wanted if first <= position < first + shard["written"]]
        if positions:
            yield shard, positions
        first += shard["written"]


def _read(store: Store, shard: str, row: Mapping[str, Any]) -> Record:
    """The sample behind a sidecar row, from its own bytes of the tar: on an object store, one ranged request."""
    start = row["tar_offset"]
    try:
        data = store.read(f"{FOLDER}/{shard}.tar", start, start + row["tar_size"])
    except FileNotFoundError as error:
        raise ShardError(
            f"{store.url}: {shard} has a manifest and no tar. Remove the manifest and run again."
        ) from error
    members = [member | {"offset": member["offset"] - start} for member in row["members"]]
    return read_sample(io.BytesIO(data), {**row, "members": members})


def _sample(record: Record, shard: str) -> Sample:
    try:
        photo, labels = decode_jpeg(record.image), decode_labels(record.parsing)
    except ValueError as error:
        raise ShardError(f"{shard}: sample {record.key} ({record.source}) can't be decoded: {error}") from error
    if photo.shape[:2] != labels.shape:
        raise ShardError(f"{shard}: sample {record.key} ({record.source}): image and label map differ in size")
    return Sample(
        shard=shard,
        photo=_data_uri("image/jpeg", encode_jpeg(thumbnail(photo), _QUALITY)),
        overlay=_data_uri("image/png", overlay_png(thumbnail(labels))),
        **{name: getattr(record, name) for name in ("key", "source", "license", "author", "width", "height")},
        **{name: getattr(record, name) for name in ("faces", "face", "caption", "face_caption")},
    )


def thumbnail(pixels: Image | LabelMap) -> Image | LabelMap:
    """Pixels (H, W, 3) by area, or labels (H, W) by the nearest, at most THUMBNAIL on the long side; never larger."""
    height, width = pixels.shape[:2]
    scale = THUMBNAIL / max(height, width)
    if scale >= 1:
        return pixels
    size = max(1, round(width * scale)), max(1, round(height * scale))
    method = cv2.INTER_AREA if pixels.ndim == 3 else cv2.INTER_NEAREST_EXACT  # plain NEAREST is half a pixel off
    return np.asarray(cv2.resize(pixels, size, interpolation=method), np.uint8)


def overlay_png(labels: LabelMap) -> bytes:
    """Label map (H, W) → palette PNG of the same size in PALETTE's colours, transparent where the background is."""
    image = PILImage.fromarray(labels)
    image.putpalette(b"".join(bytes.fromhex(color[1:]) for color in PALETTE))
    with io.BytesIO() as out:
        image.save(out, "PNG", transparency=bytes([0]), optimize=True)
        return out.getvalue()


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
