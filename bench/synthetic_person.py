"""People without photographs: the records that the stages would have made of them."""

from __future__ import annotations

import io
import shutil
import time
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from stages.codec import encode_labels
from stages.record import IDENTITY_DIM, Face, Record, key_of
from stages.storage.commit import ChainInfo, PlannedShard, commit
from stages.storage.manifest import ShardRun
from stages.storage.store import Store

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


def synthetic_person(number: int = 0) -> Record:
    """Returns a record with noise as the image, a label map of boxes, a random embedding, and
    captions. number: another one gives another image and embedding.
    """
    rng = np.random.default_rng(number)
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
        key=key_of(f"synthetic-{number}"),
        source=f"synthetic-{number}",
        image=data,
        width=_SIDE,
        height=_SIDE,
        parsing=encode_labels(labels),
        identity=identity / np.linalg.norm(identity),
        faces=(_FACE,),
        face=0,
        caption="A person looks at the camera, in front of a wall.",
        face_caption="The person has round eyes, a straight nose, small ears and a wide mouth.",
    )


def write_people(parent: Path, count: int, shard_size: int = 64) -> Path:
    """Writes a data set of synthetic people, unless it exists; returns its folder, which is in
    `parent` and has the number in its name.
    """
    folder = parent / f"people-{count}"
    if folder.exists():
        return folder
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    for index, first in enumerate(range(0, count, shard_size)):
        records = [synthetic_person(each) for each in range(first, min(first + shard_size, count))]
        shard = PlannedShard(index=index, inputs=len(records), bytes=0, digest="")
        run = ShardRun({}, "", time.time()).finish()
        commit(Store(str(partial)), shard, records, ChainInfo((), ()), run)
    return partial.replace(folder)
