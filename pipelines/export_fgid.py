"""Exports shards to the layout FGID is published in, which ConsistentID's own trainer and
`source.kind=fgid` read.

    FOLDER/JSON_all.json
    FOLDER/resize_IMG/ab/KEY.jpg
    FOLDER/parsing_mask_IMG/ab/KEY_mask.png
    FOLDER/all_faceID/ab/KEY_faceid.bin

Paths in the JSON are relative to these folders, as the reference's train.sh expects
(--data_root_path resize_IMG --parsing_root_path parsing_mask_IMG --faceid_root_path all_faceID).
The reference ignores the keys that this export adds.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np

from configs.errors import ConfigError, ShardError
from pipelines.report.palette import PALETTE
from pipelines.sources.fgid import JSON_ALL
from stages.codec import decode_jpeg, decode_labels
from stages.record import KEY_LENGTH, PROVENANCE, FloatArray, Record, face_to_dict
from stages.storage import layout
from stages.storage.reader import DatasetReader
from stages.storage.store import Store

# record fields that are added to the reference's keys, besides the faces
_FIELDS: Final = (
    *("key", "source", "sha256", *PROVENANCE, "width", "height"),
    *("source_width", "source_height", "identity_norm"),
)
_KEY: Final = re.compile(f"[0-9a-f]{{{KEY_LENGTH}}}")


def export_json(
    store: Store,
    folder: Path,
    *,
    color: bool = False,
    overwrite: bool = False,
    advance: Callable[[int], object],
) -> int:
    """Writes all written samples of `store` to `folder`. Returns their number.

    JSON_all.json appears last, when all other files are complete. color: also write images with the
    label map in colours over them. overwrite: replace files with the same names; without it, a
    folder that isn't empty raises ConfigError. advance: called with 1 after each sample.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise ConfigError(f"{folder} is not empty. Give another folder, or --overwrite.")
    folder.mkdir(parents=True, exist_ok=True)
    # also temporary files of an export that was killed
    for stale in (folder / JSON_ALL, *folder.glob(f".{JSON_ALL}.tmp-*")):
        stale.unlink(missing_ok=True)
    count = 0
    reader = DatasetReader(store)
    samples = ((index, r) for index in reader.manifests() for r in reader.samples(index))
    with Store(str(folder)).writer(JSON_ALL) as stream:
        for index, record in samples:
            try:
                values = _write(record, folder, color)
            except ValueError as error:  # its image can't be decoded
                tar = layout.tar(index)
                raise ShardError(
                    f"{store.url}/{layout.in_shards(tar)}: sample {record.key}: {error}. "
                    f"{layout.how_to_repair(tar)}"
                ) from error
            entry = json.dumps(values, ensure_ascii=False)
            stream.write(f"{',' if count else '['}\n{entry}".encode())
            count += 1
            advance(1)
        stream.write(b"\n]\n" if count else b"[]\n")
    return count


def _write(record: Record, folder: Path, color: bool) -> dict[str, Any]:
    """Writes the record's files, named by its key only. Returns its entry for JSON_all.json."""
    if not _KEY.fullmatch(record.key):
        raise ShardError(
            f"sample {record.key!r} ({record.source}): its key is not {KEY_LENGTH} hex digits"
        )
    stem = f"{record.key[:2]}/{record.key}"
    entry: dict[str, Any] = {}

    def write(subfolder: str, path: str, data: bytes, *keys: str) -> None:
        target = folder / subfolder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        entry.update(dict.fromkeys(keys, path))

    write("resize_IMG", f"{stem}.jpg", record.image, "resize_IMG", "origin_IMG")
    write("parsing_mask_IMG", f"{stem}_mask.png", record.parsing, "parsing_mask_IMG")
    if color:
        write("parsing_color_IMG", f"{stem}_color.png", _overlay(record), "parsing_color_IMG")
    assert record.identity is not None, "a sample read from a shard has an identity"
    keys = ("id_embed_file_origin", "id_embed_file_resize")
    write("all_faceID", f"{stem}_faceid.bin", _torch_bytes(record.identity), *keys)
    return {
        **entry,
        "vqa_llva": record.caption,
        "vqa_llva_more_face_detail": record.face_caption,
        **{name: getattr(record, name) for name in _FIELDS},
        "faces": [face_to_dict(face) for face in record.faces],
        "face": record.face,
    }


def _torch_bytes(identity: FloatArray) -> bytes:
    """Returns the identity as the reference stores it: a float32 tensor (1, 512) by torch.save."""
    import torch

    buffer = io.BytesIO()
    torch.save(torch.from_numpy(identity.copy()).unsqueeze(0), buffer)
    return buffer.getvalue()


def _overlay(record: Record) -> bytes:
    """Returns a PNG of the image (0.4) blended with its labels' colours (0.6), as in the reference;
    the background's colour is white.
    """
    colors = np.array([list(bytes.fromhex(color[1:])) for color in PALETTE], np.uint8)
    colors[0] = 255
    label_colors = colors[decode_labels(record.parsing)]
    blended = cv2.addWeighted(decode_jpeg(record.image), 0.4, label_colors, 0.6, 0)
    success, data = cv2.imencode(".png", np.ascontiguousarray(blended[:, :, ::-1]))
    assert success, "OpenCV encodes any uint8 array"
    return data.tobytes()
