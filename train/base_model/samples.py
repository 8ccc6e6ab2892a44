"""The samples of a data set, prepared once and kept in files that are mapped into memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from configs.errors import ShardError
from model.conditions import Conditions, build_conditions
from model.pixels import training_image
from model.spec import ModelSpec
from stages.record import Record
from train.checkpoints import write_folder_atomically
from train.mixture import Mixture

TEXTS: Final = ("all", "image", "face")  # what the rows of `Samples.ids` describe
_INFO: Final = "info.json"
_CHUNK: Final = 256  # samples read at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """N samples. R: side of the training images, S: of the image encoder's, in pixels.

    pixels: (N, 3, R, R) uint8. photos: (N, 3, S, S) uint8. regions: (N, 5, 3, S, S) uint8; valid:
    (N, 5) bool, which of them are shown. ids: (N, 3, 77) int64, the tokens of TEXTS: the text of an
    adapter's training, the caption of the image, and that of the face.
    """

    pixels: Tensor
    photos: Tensor
    regions: Tensor
    valid: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.pixels)


def prepared_samples(
    folder: Path,
    mixture: Mixture,
    tokenizer: Any,
    spec: ModelSpec,
    resolution: int,
    track: Callable[[range], Iterable[int]] = iter,
) -> Samples:
    """Returns the samples of the data set, from `folder` if they were prepared there before.

    Raises ShardError if a sample can't be read.
    """
    info = {
        "data": mixture.digest,
        "samples": len(mixture),
        "resolution": resolution,
        "side": spec.vision_size,
    }
    if not _holds(folder, info):
        write_folder_atomically(
            folder,
            lambda partial: _prepare(partial, mixture, tokenizer, spec, resolution, info, track),
        )
    return Samples(
        **{
            field.name: torch.from_numpy(np.load(folder / f"{field.name}.npy", mmap_mode="c"))
            for field in fields(Samples)
        }
    )


def _holds(folder: Path, info: dict[str, Any]) -> bool:
    try:
        return bool(json.loads((folder / _INFO).read_text(encoding="utf-8")) == info)
    except (OSError, ValueError):
        return False


def _prepare(
    folder: Path,
    mixture: Mixture,
    tokenizer: Any,
    spec: ModelSpec,
    resolution: int,
    info: dict[str, Any],
    track: Callable[[range], Iterable[int]],
) -> None:
    count, side = len(mixture), spec.vision_size
    shapes: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
        "pixels": ((3, resolution, resolution), np.uint8),
        "photos": ((3, side, side), np.uint8),
        "regions": ((5, 3, side, side), np.uint8),
        "valid": ((5,), np.bool_),
        "ids": ((len(TEXTS), 77), np.int64),
    }
    arrays = {
        name: np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=kind, shape=(count, *shape)
        )
        for name, (shape, kind) in shapes.items()
    }
    for first in track(range(0, count, _CHUNK)):
        numbers = range(first, min(first + _CHUNK, count))
        for number, record in zip(numbers, mixture.records(numbers), strict=True):
            if isinstance(record, ShardError):
                raise record
            for name, values in _sample(record, tokenizer, spec, resolution).items():
                arrays[name][number] = values.numpy()
    for array in arrays.values():
        array.flush()
    (folder / _INFO).write_text(json.dumps(info) + "\n", encoding="utf-8")


def _sample(record: Record, tokenizer: Any, spec: ModelSpec, resolution: int) -> dict[str, Tensor]:
    conditions: Conditions = build_conditions(
        record, tokenizer, spec, "corrected", resolution=resolution
    )
    texts = tokenizer(
        [record.caption, record.face_caption],
        padding="max_length",
        truncation=True,
        max_length=77,
        return_tensors="pt",
    ).input_ids
    return {
        "pixels": training_image(record, resolution),
        "photos": conditions.photo,
        "regions": conditions.region_images,
        "valid": conditions.token_valid,
        "ids": torch.cat((conditions.input_ids[None], texts)),
    }
