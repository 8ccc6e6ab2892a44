"""Shards → the layout FGID is published in, which ConsistentID's own trainer reads and
`source.kind=fgid` takes back.

    FOLDER/JSON_all.json   resize_IMG/ab/KEY.jpg   parsing_mask_IMG/ab/KEY_mask.png   all_faceID/ab/KEY_faceid.bin

Paths in the JSON are relative to these folders, as in the reference's train.sh (--data_root_path
resize_IMG --parsing_root_path parsing_mask_IMG --faceid_root_path all_faceID). What the reference
doesn't know it doesn't look at.
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
from stages.record import KEY_LENGTH, FloatArray, Record, face_to_dict
from stages.storage.reader import DatasetReader
from stages.storage.store import Store

_FIELDS: Final = (
    *("key", "source", "sha256", "license", "author", "consent", "width", "height"),
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
    """Write every sample of `store` to `folder`; returns how many. JSON_all.json appears when all
    the rest is there.

    color: also the parsing in colours over the picture. Raises ConfigError if the folder isn't
    empty and not to be overwritten; then files of the same names are replaced, others left alone.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise ConfigError(f"{folder} is there and not empty. Give another folder, or --overwrite.")
    folder.mkdir(parents=True, exist_ok=True)
    # with what a killed export left
    for old in (folder / JSON_ALL, *folder.glob(f".{JSON_ALL}.tmp-*")):
        old.unlink(missing_ok=True)
    count = 0
    reader = DatasetReader(store)
    samples = (record for index in reader.manifests() for record in reader.samples(index))
    with Store(str(folder)).writer(JSON_ALL) as stream:
        for record in samples:
            entry = json.dumps(_write(record, folder, color), ensure_ascii=False)
            stream.write(f"{',' if count else '['}\n{entry}".encode())
            count += 1
            advance(1)
        stream.write(b"\n]\n" if count else b"[]\n")
    return count


def _write(record: Record, folder: Path, color: bool) -> dict[str, Any]:
    """The record's files, named by its key alone; returns its entry."""
    if not _KEY.fullmatch(record.key):
        raise ShardError(
            f"sample {record.key!r} ({record.source}): its key is not {KEY_LENGTH} hex digits"
        )
    stem = f"{record.key[:2]}/{record.key}"
    entry: dict[str, Any] = {}

    def put(kind: str, path: str, data: bytes, *names: str) -> None:
        target = folder / kind / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        entry.update(dict.fromkeys(names, path))

    put("resize_IMG", f"{stem}.jpg", record.image, "resize_IMG", "origin_IMG")
    put("parsing_mask_IMG", f"{stem}_mask.png", record.parsing, "parsing_mask_IMG")
    if color:
        put("parsing_color_IMG", f"{stem}_color.png", _overlay(record), "parsing_color_IMG")
    assert record.identity is not None, "a sample read from a shard has an identity"
    names = ("id_embed_file_origin", "id_embed_file_resize")
    put("all_faceID", f"{stem}_faceid.bin", _torch_bytes(record.identity), *names)
    return {
        **entry,
        "vqa_llva": record.caption,
        "vqa_llva_more_face_detail": record.face_caption,
        **{name: getattr(record, name) for name in _FIELDS},
        "faces": [face_to_dict(face) for face in record.faces],
        "face": record.face,
    }


def _torch_bytes(identity: FloatArray) -> bytes:
    """As the reference saves it: a float32 tensor (1, 512)."""
    import torch

    buffer = io.BytesIO()
    torch.save(torch.from_numpy(identity.copy()).unsqueeze(0), buffer)
    return buffer.getvalue()


def _overlay(record: Record) -> bytes:
    """PNG: the picture under its labels' colours, 0.4 to 0.6 as in the reference; the background
    white.
    """
    colors = np.array([list(bytes.fromhex(color[1:])) for color in PALETTE], np.uint8)
    colors[0] = 255
    mixed = cv2.addWeighted(
        decode_jpeg(record.image), 0.4, colors[decode_labels(record.parsing)], 0.6, 0
    )
    done, data = cv2.imencode(".png", np.ascontiguousarray(mixed[:, :, ::-1]))
    assert done, "OpenCV encodes any uint8 array"
    return data.tobytes()
