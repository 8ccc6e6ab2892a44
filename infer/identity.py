"""Identity: a person as the model sees them, read once from a photograph, saved, and reused for any
prompt.

The photograph goes through the very stages of the data set pipeline, so what is known of it here is
what would stand in a shard. Kept beside that are the image tower's states, which take longest to
make. ID tokens are not kept: they come from the adapter in a moment, and without them an identity
serves every adapter over the same image tower.
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

# A record's reason → what a person is told; reasons that aren't here are faults of the file, not of
# the face.
_FACE_REASONS: Final = {
    "no_face": "no face found in {photo}",
    "no_face_parsed": "no face found in {photo}: something was detected, but no facial skin seen "
    "there",
    "face_too_small": "the face in {photo} is too small",
    "no_identity": "the face in {photo} could not be recognised",
}
_LEAST_FACE: Final = 32  # short side of the face's box, pixels of the resized picture
_FACE_ADVICE: Final = (
    "Give a photograph that shows one face, from the front and at least 100 pixels wide."
)
_FILE_ADVICE: Final = "Give a JPEG, PNG or WebP photograph that opens in a viewer."


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Identity:
    """One person, from one photograph; tensors are on the CPU.

    record: the photograph after the stages. regions: names of the regions seen, as `mode` calls
    them. clip_hidden: (N, V), the image tower's states of the photograph; region_hidden: (R, N, V),
    of its regions, in their order. tower: (V,), the tower's answer to zero pixels, by which a
    reader knows whether it has the same one.
    """

    record: Record
    mode: Mode
    regions: tuple[str, ...]
    clip_hidden: Tensor
    region_hidden: Tensor
    tower: Tensor

    @property
    def embedding(self) -> Tensor:
        """The ArcFace identity, (512,) float32 of unit norm."""
        assert self.record.identity is not None, "an identity is made of whole records only"
        return torch.from_numpy(self.record.identity.copy())

    def save(self, path: str | Path) -> Path:
        """Write to a safetensors file: the sample's members as bytes, the states as tensors.
        Returns the path.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"member.{name}": _bytes_to_tensor(data)
            for name, data in to_members(self.record, ()).items()
        }
        for name in ("clip_hidden", "region_hidden", "tower"):
            tensors[name] = getattr(self, name).contiguous()
        # One entry: safetensors writes several in no fixed order, and the same person should give
        # the same bytes.
        metadata = {
            "identity": json.dumps({"format": _FORMAT, "mode": self.mode, "regions": self.regions})
        }
        partial = target.with_name(f".{target.name}.partial")
        save_file(tensors, partial, metadata=metadata)
        partial.replace(target)
        return target

    @classmethod
    def load(cls, path: str | Path) -> Identity:
        """Read what `save` wrote. Raises SourceError for a file that isn't there or holds no
        identity.
        """
        source = Path(path)
        if not source.is_file():
            raise SourceError(
                f"no identity at {source}; runs of infer.cli save one as identity.safetensors"
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
                clip_hidden=tensors["clip_hidden"],
                region_hidden=tensors["region_hidden"],
                tower=tensors["tower"],
            )
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise SourceError(
                f"{source} holds no identity ({error}); make it again from the photograph"
            ) from error


def read_photo(path: str | Path) -> Record:
    """The record of a photograph on disk, as the data set pipeline would begin it: its name alone
    is its source.

    Raises SourceError for a path that isn't there, isn't a regular file, or can't be read.
    """
    photo = Path(path)
    if photo.is_dir():
        raise SourceError(f"{photo} is a folder; expected one photograph. Name a file in it.")
    if not photo.exists():
        raise SourceError(
            f"no photograph at {photo}. Check the path; it is taken from the folder you are in."
        )
    if not photo.is_file():
        raise SourceError(f"{photo} is not a regular file; expected a photograph.")
    try:
        data = photo.read_bytes()
    except OSError as error:
        raise SourceError(
            f"{photo} can't be read: {error.strerror or error}. Check its permissions."
        ) from error
    return photo_record(data, photo.name)


def photo_record(data: bytes, name: str) -> Record:
    """The record of a photograph's bytes under the name that it has in a data set."""
    return Record(
        key=key_of(name), source=name, sha256=hashlib.sha256(data).hexdigest(), image=data
    )


def set_up_stages(config: DatasetConfig) -> list[Stage]:
    """The data set's stages, in order, with their weights loaded."""
    stages = build_stages(config)
    for stage in stages:
        stage.setup()
    return stages


def run_stages(record: Record, stages: Sequence[Stage], photo: str | Path | None = None) -> Record:
    """The record after all stages, which are set up already.

    photo: what to call the photograph in an error. Raises FaceError if it shows no usable face,
    SourceError if it is no usable picture.
    """
    [record] = run_chain(stages, [record])
    if record.ok and record.main_face.side < _LEAST_FACE:
        detail = f"{record.main_face.side:.0f} pixels wide, expected at least {_LEAST_FACE}"
        record = reject(record, Dropped("face_too_small", detail), "detect")
    if not record.ok:
        raise _refusal(record, str(photo or record.source))
    return record


def _refusal(record: Record, photo: str) -> FaceError | SourceError:
    detail = f" ({record.detail})" if record.detail else ""
    if record.reason in _FACE_REASONS:
        return FaceError(
            f"{_FACE_REASONS[record.reason].format(photo=photo)}{detail}. {_FACE_ADVICE}"
        )
    if record.reason == "not_an_image":
        return SourceError(f"{photo} is not an image{detail}. {_FILE_ADVICE}")
    verdict = "was refused" if record.status is Status.DROPPED else "could not be read"
    reason = record.reason.replace("_", " ")
    return SourceError(
        f"{photo} {verdict} in stage {record.stage!r}: {reason}{detail}. {_FILE_ADVICE}"
    )


def _bytes_to_tensor(data: bytes) -> Tensor:
    array: Any = np.frombuffer(data, np.uint8).copy()
    return torch.from_numpy(array)
