"""Identity: a person read from a photograph, which can be saved and reused for any prompt.

The photograph goes through the stages of the data set pipeline, so its record equals that of a
sample in a shard. An identity also has the image encoder's states, which take longest to compute.
It has no ID tokens: the adapter computes them quickly, and without them an identity can be used
with every adapter that has the same image encoder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs.errors import FaceError, SourceError
from configs.schema import DatasetConfig
from stages.base import Dropped, Stage, reject, run_chain
from stages.chain import build_stages
from stages.record import Record, Status, key_of
from stages.regions import Mode
from stages.storage.samples import from_members, to_members

_FORMAT: Final = "consistentid-identity-1"

# A record's reason → the error message. Other reasons concern the file, not the face.
_FACE_REASONS: Final = {
    "no_face": "no face found in {photo}",
    "no_face_parsed": "no face found in {photo}: a face was detected, but no facial skin in it",
    "face_too_small": "the face in {photo} is too small",
    "no_identity": "the face in {photo} could not be recognised",
}
_MIN_FACE: Final = 32  # short side of the face's box, in pixels of the resized image
_FACE_ADVICE: Final = (
    "Give a photograph that shows one face, from the front and at least 100 pixels wide."
)
_FILE_ADVICE: Final = "Give a JPEG, PNG, WebP, AVIF or HEIC photograph that opens in a viewer."


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Identity:
    """A person, from one photograph; tensors are on the CPU.

    record: the photograph's record after the stages. regions: names of the R regions in it, in
    `mode`. clip_hidden: (N, V), the image encoder's states of the photograph; region_hidden: (R,
    N, V), those of the regions. encoder_fingerprint: (V,), the image encoder's first state of zero
    pixels, by which a generator recognises its own image encoder.
    """

    record: Record
    mode: Mode
    regions: tuple[str, ...]
    clip_hidden: Tensor
    region_hidden: Tensor
    encoder_fingerprint: Tensor

    @property
    def embedding(self) -> Tensor:
        """The ArcFace embedding, (512,) float32, unit norm."""
        assert self.record.identity is not None, "an identity's record has been through all stages"
        return torch.from_numpy(self.record.identity.copy())

    def save(self, path: str | Path) -> Path:
        """Writes a safetensors file and returns its path.

        It holds the members of the record's sample as bytes, and the states as tensors.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"member.{name}": _bytes_to_tensor(data)
            for name, data in to_members(self.record, ()).items()
        }
        for name, tensor in _STATE_NAMES.items():
            tensors[tensor] = getattr(self, name).contiguous()
        # A single entry, because safetensors writes several in no fixed order, and saving the same
        # identity again should give the same bytes.
        metadata = {
            "identity": json.dumps({"format": _FORMAT, "mode": self.mode, "regions": self.regions})
        }
        partial = target.with_name(f".{target.name}.partial")
        save_file(tensors, partial, metadata=metadata)
        partial.replace(target)
        return target

    @classmethod
    def load(cls, path: str | Path) -> Identity:
        """Reads a file that `save` wrote.

        Raises SourceError for a file that doesn't exist or holds no identity.
        """
        source = Path(path)
        if not source.is_file():
            raise SourceError(
                f"no identity at {source}; name the identity.safetensors of an infer.cli run"
            )
        try:
            with safe_open(source, framework="pt") as file:
                metadata = json.loads((file.metadata() or {}).get("identity", "{}"))
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, expected {_FORMAT!r}")
            prefix = "member."
            members = {
                name.removeprefix(prefix): value.numpy().tobytes()
                for name, value in tensors.items()
                if name.startswith(prefix)
            }
            mode: Mode = "legacy" if metadata["mode"] == "legacy" else "corrected"
            return cls(
                record=from_members(members),
                mode=mode,
                regions=tuple(metadata["regions"]),
                **{name: tensors[tensor] for name, tensor in _STATE_NAMES.items()},
            )
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise SourceError(
                f"{source} holds no identity ({error}); make it again from the photograph"
            ) from error


# Field of Identity → tensor in its file.
_STATE_NAMES: Final = {
    "clip_hidden": "clip_hidden",
    "region_hidden": "region_hidden",
    "encoder_fingerprint": "tower",
}


def read_photo(path: str | Path) -> Record:
    """Reads a photograph and returns its record before the stages; its source is the file's name.

    Raises SourceError for a path that doesn't exist, isn't a regular file, or can't be read.
    """
    photo = Path(path)
    if photo.is_dir():
        raise SourceError(f"{photo} is a folder; expected one photograph. Name a file in it.")
    if not photo.exists():
        raise SourceError(
            f"no photograph at {photo}. Check the path; it is relative to the current folder."
        )
    if not photo.is_file():
        raise SourceError(f"{photo} is not a regular file; expected a photograph. Name another.")
    try:
        data = photo.read_bytes()
    except OSError as error:
        raise SourceError(
            f"{photo} can't be read: {error.strerror or error}. Check its permissions."
        ) from error
    return photo_record(data, photo.name)


def photo_record(data: bytes, name: str) -> Record:
    """Returns the record of a photograph before the stages.

    data: the file's bytes. name: the record's source, from which its key is made.
    """
    return Record(
        key=key_of(name), source=name, sha256=hashlib.sha256(data).hexdigest(), image=data
    )


def set_up_stages(config: DatasetConfig) -> list[Stage]:
    """Builds the data set's stages, in order, and loads their weights."""
    stages = build_stages(config)
    for stage in stages:
        stage.setup()
    return stages


def run_stages(record: Record, stages: Sequence[Stage], photo: str | Path | None = None) -> Record:
    """Runs a record through stages that are set up, and returns it.

    photo: name of the photograph in error messages. Raises FaceError if it shows no usable face,
    SourceError if it is no usable image.
    """
    [record] = run_chain(stages, [record])
    if record.ok and record.main_face.side < _MIN_FACE:
        detail = f"{record.main_face.side:.0f} pixels wide, expected at least {_MIN_FACE}"
        record = reject(record, Dropped("face_too_small", detail), "detect")
    if not record.ok:
        raise _error_for(record, str(photo or record.source))
    return record


def _error_for(record: Record, photo: str) -> FaceError | SourceError:
    """Returns the error that explains why a record was dropped or failed."""
    detail = f" ({record.detail})" if record.detail else ""
    if record.reason in _FACE_REASONS:
        return FaceError(
            f"{_FACE_REASONS[record.reason].format(photo=photo)}{detail}. {_FACE_ADVICE}"
        )
    if record.reason == "not_an_image":
        return SourceError(f"{photo} is not an image{detail}. {_FILE_ADVICE}")
    outcome = "was rejected" if record.status is Status.DROPPED else "could not be read"
    reason = record.reason.replace("_", " ")
    return SourceError(
        f"{photo} {outcome} in stage {record.stage!r}: {reason}{detail}. {_FILE_ADVICE}"
    )


def _bytes_to_tensor(data: bytes) -> Tensor:
    array: Any = np.frombuffer(data, np.uint8).copy()
    return torch.from_numpy(array)
