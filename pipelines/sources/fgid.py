"""The layout ConsistentID's authors publish FGID in: JSON_all.json beside pictures, label maps and
identities.

The reference's spellings vary from script to script, and its paths are relative to folders that its
trainer is told of, or absolute on the machine that wrote them: see `FgidLayout._find`. Where an
entry brings a label map, an identity or captions, the stages that would make them aren't run for
it. Nothing is unpickled but tensors.
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
from pipelines.sources.base import FACTS, Input, Source
from pipelines.sources.files import read_file
from pipelines.sources.objects import read_objects
from stages.base import Failed
from stages.codec import decode_labels
from stages.record import IDENTITY_DIM, Face, FloatArray, Record, face_from_dict
from stages.regions import LABELS
from stages.resize import as_jpeg

JSON_ALL: Final = "JSON_all.json"

# What the reference calls it, in the order of preference → the folders its paths may be relative
# to.
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
_OWN: Final = (  # what export-json adds
    *(
        "faces",
        "face",
        "sha256",
        "width",
        "height",
        "source_width",
        "source_height",
        "identity_norm",
    ),
)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PNG = b"\x89PNG\r\n\x1a\n"
_LONGEST_PATH = 4096
_MOST_IDENTITY_BYTES = 1 << 20

# image, parsing, identity: [the reference's name, path]; caption, face_caption; _OWN
Entry = dict[str, Any]


class FgidLayout(Source):
    """`source.path` is the JSON file, or the folder that holds JSON_all.json.

    Pictures are named by `source` where export-json wrote it, else by their path as it stands in
    the JSON.
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
                "folder that holds one, on "
                "this machine."
            )
        for number, raw in enumerate(read_objects(self._file), 1):
            yield self._input(raw, number)

    def _input(self, raw: dict[str, Any], number: int) -> Input:
        raw = {name: _clean(value) for name, value in raw.items()}
        kinds = {"image": _IMAGE, "parsing": _PARSING, "identity": _IDENTITY}
        chosen = {kind: self._chosen(raw, names) for kind, names in kinds.items()}
        entry: Entry = {kind: given for kind, (given, _) in chosen.items()}
        entry["caption"], entry["face_caption"] = _first(raw, _CAPTION), _first(raw, _FACE_CAPTION)
        entry |= {name: raw[name] for name in _OWN if name in raw}
        locator = json.dumps(
            {name: value for name, value in entry.items() if value not in (None, "", [])}
        )
        facts = {name: raw[name] for name in FACTS if _is_text(raw.get(name))}
        found = [stat for _, stat in chosen.values()]
        name = (
            _first(raw, ("source",)) or _first(raw, tuple(_IMAGE)).lstrip("/") or f"entry {number}"
        )
        return Input(
            source=name,
            locator=locator.encode(),
            size=found[0][0],
            version=hashlib.sha256(json.dumps([locator, facts, found]).encode()).hexdigest()[:32],
            facts=json.dumps(facts) if facts else "",
        )

    def _chosen(
        self, raw: dict[str, Any], names: _Names
    ) -> tuple[tuple[str, str] | None, tuple[int, int]]:
        """The first of `names` whose file is there, else the first that is given; its size and time
        of change, -1 for no file.
        """
        given = [(name, raw[name]) for name in names if _is_text(raw.get(name))]
        for pair in given:
            try:
                found = os.stat(self._find(*pair))
            except (Failed, OSError):
                continue
            return pair, (found.st_size, found.st_mtime_ns)
        return given[0] if given else None, (-1, -1)

    def _find(self, name: str, path: str) -> bytes:
        """Where a file lies below the JSON's folder: at the longest ending of `path` that exists
        there, or in the folders of the layout that such files lie in. Raises Failed:
        outside_source, not_a_file.
        """
        parts = [part for part in os.path.normpath(path).split("/") if part]
        if ".." in parts:
            raise Failed("outside_source", f"{name}: {path!r} leaves the JSON's folder")
        for start in range(len(parts) if len(path) <= _LONGEST_PATH else 0):
            for root in ("", *_FOLDERS[name]):
                candidate = os.path.join(self._folder, root, *parts[start:])
                if os.path.isfile(candidate):
                    if (
                        os.path.commonpath([self._folder, os.path.realpath(candidate)])
                        != self._folder
                    ):
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
            raise Failed("bad_entry", f"it names no picture: expected one of {', '.join(_IMAGE)}")
        return read_file(self._find(*entry["image"]), self.limit, count)

    def gives(self, item: Input) -> frozenset[str]:
        return _gives(json.loads(item.locator))

    def same(self, old: Record, new: Record) -> bool:
        """False for a whole record: `old` doesn't tell what of it was given, and what was made."""
        return not new.ok and super().same(old, new)

    def complete(self, record: Record, item: Input) -> Record:
        """Raises Failed: what reading a file and as_jpeg raise, bad_faces, bad_parsing,
        bad_embedding.
        """
        entry: Entry = json.loads(item.locator)
        given = _gives(entry)
        if _SHA256.fullmatch(str(entry.get("sha256"))):
            # of the photograph it was made of, long ago
            record = replace(record, sha256=entry["sha256"])
        if "image" in given:
            image, width, height = as_jpeg(record.image, self._resize)
            source_width, source_height = _source_size(entry, width, height)
            record = replace(record, image=image, width=width, height=height)
            record = replace(record, source_width=source_width, source_height=source_height)
        if "faces" in given:
            record = replace(record, faces=_faces(entry, record), face=entry["face"])
        if "parsing" in given:
            data = read_file(self._find(*entry["parsing"]), self.limit)
            record = replace(record, parsing=_checked_labels(data, record))
        if "identity" in given:
            data = read_file(self._find(*entry["identity"]), _MOST_IDENTITY_BYTES)
            norm = entry.get("identity_norm")
            known = float(norm) if isinstance(norm, int | float) and math.isfinite(norm) else None
            record = replace(record, identity=read_identity(data), identity_norm=known)
        if "caption" in given:
            record = replace(record, caption=entry["caption"], face_caption=entry["face_caption"])
        return record


def _gives(entry: Entry) -> frozenset[str]:
    """What an entry brings. Captions count as a pair. A picture with a label map or faces keeps its
    size: they are in its pixels.
    """
    given: set[str] = {name for name in ("parsing",) if name in entry}
    if "identity" in entry:
        given |= {"identity", "identity_norm"}
    if "caption" in entry and "face_caption" in entry:
        given |= {"caption", "face_caption"}
    if "faces" in entry:
        given |= {"faces", "face"}
    if given & {"parsing", "faces"}:
        given |= {"image", "width", "height", "source_width", "source_height"}
    return frozenset(given)


def _source_size(entry: Entry, width: int, height: int) -> tuple[int, int]:
    """(width, height) that the entry states of the photograph behind its picture; else the
    picture's own.
    """
    given = [
        side
        for side in (entry.get("source_width"), entry.get("source_height"))
        if type(side) is int
    ]
    return (
        (given[0], given[1])
        if len(given) == 2 and 0 < min(given) <= max(given) < 1 << 20
        else (width, height)
    )


def _faces(entry: Entry, record: Record) -> tuple[Face, ...]:
    """Raises Failed bad_faces unless they are sound, and of a picture of this size."""
    size = (entry.get("width", record.width), entry.get("height", record.height))
    if size != (record.width, record.height):
        raise Failed(
            "bad_faces",
            f"they are of a picture of {size[0]}×{size[1]}, not {record.width}×{record.height}",
        )
    try:
        faces = tuple(face_from_dict(face) for face in entry["faces"])
        numbers = [
            value for face in faces for value in (*face.box, *sum(face.landmarks, ()), face.score)
        ]
        if not all(math.isfinite(value) for value in numbers) or {
            len(face.landmarks) for face in faces
        } != {5}:
            raise ValueError("expected finite numbers, and five landmarks each")
        if type(entry.get("face")) is not int or not 0 <= entry["face"] < len(faces):
            raise ValueError(f"face={entry.get('face')!r} is none of {len(faces)}")
    except (KeyError, TypeError, ValueError) as error:
        raise Failed("bad_faces", f"{type(error).__name__}: {error}") from None
    return faces


def _checked_labels(data: bytes, record: Record) -> bytes:
    """A label map's PNG, if it is one of the record's picture. Raises Failed bad_parsing."""
    if not data.startswith(_PNG) or len(data) < 24:
        raise Failed("bad_parsing", f"no PNG: begins with {data[:8]!r}")
    width, height = struct.unpack(">II", data[16:24])  # before anything is decoded
    if (width, height) != (record.width, record.height):
        raise Failed("bad_parsing", f"{width}×{height}, the picture {record.width}×{record.height}")
    try:
        highest = int(decode_labels(data).max())
    except ValueError as error:
        raise Failed("bad_parsing", str(error)) from None
    if highest >= len(LABELS):
        raise Failed("bad_parsing", f"label {highest}, expected 0 to {len(LABELS) - 1}")
    return data


def read_identity(data: bytes) -> FloatArray:
    """A (1, 512) or (512,) tensor as torch.save wrote it, or such an .npy → float32[512] of unit
    norm.

    One of unit norm is left to the bit. Code in it isn't run. Raises Failed bad_embedding.
    """
    try:
        if data.startswith(b"\x93NUMPY"):
            values = np.load(io.BytesIO(data), allow_pickle=False)
        else:
            import torch

            # torch's own are stored; a deflated one could hold anything
            if zipfile.is_zipfile(io.BytesIO(data)):
                with zipfile.ZipFile(io.BytesIO(data)) as packed:
                    if sum(member.file_size for member in packed.infolist()) > _MOST_IDENTITY_BYTES:
                        raise ValueError(f"it unpacks to over {_MOST_IDENTITY_BYTES:,} bytes")
            tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            values = (
                tensor.to(torch.float32).numpy()
                if tensor.shape in ((1, IDENTITY_DIM), (IDENTITY_DIM,))
                else None
            )
    except Exception as error:  # noqa: BLE001 - torch's and numpy's readers raise whatever broken bytes provoke
        raise Failed(
            "bad_embedding", f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        ) from None
    if (
        values is None
        or values.shape not in ((1, IDENTITY_DIM), (IDENTITY_DIM,))
        or values.dtype.kind != "f"
    ):
        raise Failed("bad_embedding", f"expected a tensor of (1, {IDENTITY_DIM}) numbers")
    identity: FloatArray = values.reshape(-1).astype(np.float32)
    norm = float(np.linalg.norm(identity))
    if not math.isfinite(norm) or norm < 1e-6:
        raise Failed("bad_embedding", f"its norm is {norm}")
    near = abs(norm - 1) < 1e-3  # as near as the embed stage demands
    return identity if near else np.asarray(identity / norm, np.float32)


def _first(raw: dict[str, Any], names: tuple[str, ...]) -> str:
    return next((raw[name] for name in names if _is_text(raw.get(name))), "")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _clean(value: Any) -> Any:
    """Text that UTF-8 can hold: JSON may escape halves of surrogate pairs."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
