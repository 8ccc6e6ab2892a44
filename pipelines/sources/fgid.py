"""Reads FGID as ConsistentID's authors publish it: JSON_all.json beside images, label maps and
identity embeddings.

The reference's scripts use several spellings of the same JSON key. Its paths are relative to
folders given to its trainer on the command line, or absolute on the machine that wrote them; see
`FgidLayout._resolve`. If an entry comes with a label map, an identity or captions, the stages that
would compute them aren't run for it. Only tensors are unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from configs.errors import SourceError
from configs.schema import DatasetConfig
from pipelines.sources.base import Input, Source
from pipelines.sources.files import read_file
from pipelines.sources.objects import read_objects
from stages.base import Failed
from stages.codec import decode_labels
from stages.record import IDENTITY_DIM, PROVENANCE, Face, FloatArray, Record, face_from_dict
from stages.regions import LABELS
from stages.resize import as_jpeg

JSON_ALL: Final = "JSON_all.json"

# The reference's JSON keys, preferred ones first → folders that the paths may be relative to.
_Names = Mapping[str, tuple[str, ...]]
_IMAGE: Final[_Names] = {
    "resize_IMG": ("resize_IMG", "FGID_resize"),
    "origin_IMG": ("origin_IMG", "FGID_Origin"),
    "IMG": ("resize_IMG", "FGID_resize", "origin_IMG", "FGID_Origin"),
}
_PARSING: Final[_Names] = {"parsing_mask_IMG": ("parsing_mask_IMG", "FGID_parsing_mask")}
_IDENTITY: Final[_Names] = dict.fromkeys(
    ("id_embed_file_origin", "id_embed_file_resize"), ("all_faceID", "FGID_faceID")
)
_FOLDERS: Final[_Names] = {**_IMAGE, **_PARSING, **_IDENTITY}
_CAPTION: Final = ("vqa_llva",)
_FACE_CAPTION: Final = ("vqa_llva_more_face_detail", "vqa_llva_facial", "vqa_llva_face_caption")
# keys that `export-json` adds to the reference's
_EXPORTED: Final = (
    "faces",
    "face",
    "sha256",
    "width",
    "height",
    "source_width",
    "source_height",
    "identity_norm",
)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_PATH = 4096  # characters
_MAX_SIDE = 1 << 20  # pixels
_MAX_IDENTITY_BYTES = 1 << 20

# An Input's locator: image, parsing, identity: [JSON key, path]; caption, face_caption; _EXPORTED.
Entry = dict[str, Any]


class FgidLayout(Source):
    """`source.path` is the JSON file, or a folder with a JSON_all.json in it.

    An input's name is the entry's `source`, which export-json writes, else its image path as the
    JSON states it.
    """

    def __init__(self, config: DatasetConfig) -> None:
        super().__init__(config)
        path = Path(self.config.path)
        self._file = path / JSON_ALL if path.is_dir() else path
        self._folder = os.path.realpath(self._file.parent)
        self._resize = config.resize

    def list(self) -> Iterator[Input]:
        if not self._file.is_file():
            raise SourceError(
                f"source.path={self.config.path!r} is no FGID set. Give a {JSON_ALL}, or a "
                "folder that holds one, on this machine."
            )
        for number, raw in enumerate(read_objects(self._file), 1):
            yield self._input(raw, number)

    def _input(self, raw: dict[str, Any], number: int) -> Input:
        raw = {name: _to_utf8(value) for name, value in raw.items()}
        kinds = {"image": _IMAGE, "parsing": _PARSING, "identity": _IDENTITY}
        chosen = {kind: self._first_existing(raw, names) for kind, names in kinds.items()}
        entry: Entry = {kind: name_and_path for kind, (name_and_path, _) in chosen.items()}
        entry["caption"] = _first_text(raw, _CAPTION)
        entry["face_caption"] = _first_text(raw, _FACE_CAPTION)
        entry |= {name: raw[name] for name in _EXPORTED if name in raw}
        locator = json.dumps(
            {name: value for name, value in entry.items() if value not in (None, "", [])}
        )
        provenance = {name: raw[name] for name in PROVENANCE if _is_text(raw.get(name))}
        sizes_and_times = [size_and_time for _, size_and_time in chosen.values()]
        image_path = _first_text(raw, tuple(_IMAGE)).lstrip("/")
        version = json.dumps([locator, provenance, sizes_and_times])
        return Input(
            source=_first_text(raw, ("source",)) or image_path or f"entry {number}",
            locator=locator.encode(),
            size=sizes_and_times[0][0],
            version=hashlib.sha256(version.encode()).hexdigest()[:32],
            provenance=json.dumps(provenance) if provenance else "",
        )

    def _first_existing(
        self, raw: dict[str, Any], names: _Names
    ) -> tuple[tuple[str, str] | None, tuple[int, int]]:
        """Returns ((JSON key, path), (size in bytes, modification time in ns)).

        Chooses the first of `names` whose file exists, else the first that the entry has, with
        (-1, -1); None if the entry has none of them.
        """
        stated = [(name, raw[name]) for name in names if _is_text(raw.get(name))]
        for name, path in stated:
            try:
                info = os.stat(self._resolve(name, path))
            except (Failed, OSError):
                continue
            return (name, path), (info.st_size, info.st_mtime_ns)
        return stated[0] if stated else None, (-1, -1)

    def _resolve(self, name: str, path: str) -> bytes:
        """Returns the file that `path`, stated under the JSON key `name`, refers to.

        Looks below the JSON's folder, and below its subfolders for such files, for the longest
        ending of `path` that exists there. Raises Failed: outside_source, not_a_file.
        """
        parts = [part for part in os.path.normpath(path).split("/") if part]
        if ".." in parts:
            raise Failed("outside_source", f"{name}: {path!r} leaves the JSON's folder")
        for start in range(len(parts) if len(path) <= _MAX_PATH else 0):
            for root in ("", *_FOLDERS[name]):
                candidate = os.path.join(self._folder, root, *parts[start:])
                if not os.path.isfile(candidate):
                    continue
                real = os.path.realpath(candidate)
                if os.path.commonpath([self._folder, real]) != self._folder:
                    raise Failed(
                        "outside_source",
                        f"{name}: {path!r} is a link that leaves the JSON's folder",
                    )
                return os.fsencode(candidate)
        raise Failed(
            "not_a_file", f"{name}: no ending of {path!r} is a file below the JSON's folder"
        )

    def read(self, item: Input, count: int = -1) -> bytes:
        """Raises Failed: bad_entry, outside_source, not_a_file, unreadable, too_many_bytes."""
        entry: Entry = json.loads(item.locator)
        if "image" not in entry:
            raise Failed("bad_entry", f"it names no image: expected one of {', '.join(_IMAGE)}")
        return read_file(self._resolve(*entry["image"]), self.max_bytes, count)

    def provided_fields(self, item: Input) -> frozenset[str]:
        return _provided_fields(json.loads(item.locator))

    def is_unchanged(self, old: Record, new: Record) -> bool:
        """False unless `new` failed: `old` doesn't state which of its fields came with the entry
        and which were computed.
        """
        return not new.ok and super().is_unchanged(old, new)

    def add_provided_fields(self, record: Record, item: Input) -> Record:
        """Raises Failed: the reasons of `read_file` and `as_jpeg`, bad_faces, bad_parsing,
        bad_embedding.
        """
        entry: Entry = json.loads(item.locator)
        provided = _provided_fields(entry)
        if _SHA256.fullmatch(str(entry.get("sha256"))):
            # of the original photograph, before an export
            record = replace(record, sha256=entry["sha256"])
        if "image" in provided:
            image, width, height = as_jpeg(record.image, self._resize)
            source_width, source_height = _source_size(entry, width, height)
            record = replace(record, image=image, width=width, height=height)
            record = replace(record, source_width=source_width, source_height=source_height)
        if "faces" in provided:
            record = replace(record, faces=_faces(entry, record), face=entry["face"])
        if "parsing" in provided:
            data = read_file(self._resolve(*entry["parsing"]), self.max_bytes)
            record = replace(record, parsing=_checked_labels(data, record))
        if "identity" in provided:
            data = read_file(self._resolve(*entry["identity"]), _MAX_IDENTITY_BYTES)
            norm = _finite(entry.get("identity_norm"))
            record = replace(record, identity=read_identity(data), identity_norm=norm)
        if "caption" in provided:
            record = replace(record, caption=entry["caption"], face_caption=entry["face_caption"])
        return record


def _provided_fields(entry: Entry) -> frozenset[str]:
    """Returns the record fields that an entry comes with; captions only if it has both.

    An image that comes with a label map or faces isn't resized, since they are in its pixels.
    """
    fields: set[str] = {"parsing"} & entry.keys()
    if "identity" in entry:
        fields |= {"identity", "identity_norm"}
    if "caption" in entry and "face_caption" in entry:
        fields |= {"caption", "face_caption"}
    if "faces" in entry:
        fields |= {"faces", "face"}
    if fields & {"parsing", "faces"}:
        fields |= {"image", "width", "height", "source_width", "source_height"}
    return frozenset(fields)


def _source_size(entry: Entry, width: int, height: int) -> tuple[int, int]:
    """Returns (width, height) of the original photograph as the entry states it, else the image's
    own.
    """
    source_width, source_height = entry.get("source_width"), entry.get("source_height")
    if type(source_width) is not int or type(source_height) is not int:
        return width, height
    if not (0 < source_width < _MAX_SIDE and 0 < source_height < _MAX_SIDE):
        return width, height
    return source_width, source_height


def _faces(entry: Entry, record: Record) -> tuple[Face, ...]:
    """Returns the entry's faces. Raises Failed bad_faces if they are malformed, or belong to an
    image of another size.
    """
    size = (entry.get("width", record.width), entry.get("height", record.height))
    if size != (record.width, record.height):
        raise Failed(
            "bad_faces",
            f"they are of an image of {size[0]}×{size[1]}, not {record.width}×{record.height}",
        )
    try:
        faces = tuple(face_from_dict(face) for face in entry["faces"])
        numbers = [
            value for face in faces for value in (*face.box, *sum(face.landmarks, ()), face.score)
        ]
        landmark_counts = {len(face.landmarks) for face in faces}
        if not all(math.isfinite(value) for value in numbers) or landmark_counts != {5}:
            raise ValueError("expected finite numbers, and five landmarks each")
        if type(entry.get("face")) is not int or not 0 <= entry["face"] < len(faces):
            raise ValueError(f"face={entry.get('face')!r} is none of {len(faces)}")
    except (KeyError, TypeError, ValueError) as error:
        raise Failed("bad_faces", f"{type(error).__name__}: {error}") from None
    return faces


def _checked_labels(data: bytes, record: Record) -> bytes:
    """Returns `data` if it is a label map (PNG, labels 0-18) of the image's size.

    Raises Failed bad_parsing.
    """
    if not data.startswith(_PNG_SIGNATURE) or len(data) < 24:
        raise Failed("bad_parsing", f"no PNG: begins with {data[:8]!r}")
    width, height = struct.unpack(">II", data[16:24])  # checked before anything is decoded
    if (width, height) != (record.width, record.height):
        raise Failed("bad_parsing", f"{width}×{height}, the image {record.width}×{record.height}")
    try:
        highest = int(decode_labels(data).max())
    except ValueError as error:
        raise Failed("bad_parsing", str(error)) from None
    if highest >= len(LABELS):
        raise Failed("bad_parsing", f"label {highest}, expected 0 to {len(LABELS) - 1}")
    return data


def read_identity(data: bytes) -> FloatArray:
    """Returns float32[512] of unit norm, from a (1, 512) or (512,) tensor that torch.save wrote, or
    from an .npy file of that shape.

    A vector whose norm is 1 within 0.001 is returned unscaled. Pickled code isn't run. Raises
    Failed bad_embedding.
    """
    shapes = ((1, IDENTITY_DIM), (IDENTITY_DIM,))
    try:
        if data.startswith(b"\x93NUMPY"):
            values = np.load(io.BytesIO(data), allow_pickle=False)
        else:
            import torch

            _check_unpacked_size(data)
            tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            values = tensor.to(torch.float32).numpy() if tensor.shape in shapes else None
    except Exception as error:  # noqa: BLE001 - torch and numpy raise many types for broken bytes
        raise Failed(
            "bad_embedding", f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        ) from None
    if values is None or values.shape not in shapes or values.dtype.kind != "f":
        raise Failed("bad_embedding", f"expected a tensor of (1, {IDENTITY_DIM}) numbers")
    identity: FloatArray = values.reshape(-1).astype(np.float32)
    norm = float(np.linalg.norm(identity))
    if not math.isfinite(norm) or norm < 1e-6:
        raise Failed("bad_embedding", f"its norm is {norm}")
    is_unit = abs(norm - 1) < 1e-3
    return identity if is_unit else np.asarray(identity / norm, np.float32)


def _check_unpacked_size(data: bytes) -> None:
    """Raises ValueError if `data` is a zip that unpacks to too many bytes.

    torch.save stores without compression, but a file from elsewhere may be a zip bomb.
    """
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(member.file_size for member in archive.infolist()) > _MAX_IDENTITY_BYTES:
            raise ValueError(f"it unpacks to over {_MAX_IDENTITY_BYTES:,} bytes")


def _first_text(raw: dict[str, Any], names: tuple[str, ...]) -> str:
    return next((raw[name] for name in names if _is_text(raw.get(name))), "")


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _to_utf8(value: Any) -> Any:
    """Returns text with lone surrogates, which JSON escapes may contain, replaced by "?"."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
