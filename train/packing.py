"""Batches as the loader's workers hand them over: images and masks as bytes, no random numbers.

A worker's batch goes through shared memory, of which containers have little. Packed, a sample at
512 pixels has 2 MB, and 13 MB as it is trained on.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

import torch
from torch import Tensor

from configs.errors import ConfigError
from model.conditions import ConditionBatch
from stages.regions import MAX_REGIONS
from train.texts import text_ids, text_places

_SHARED: Final = Path("/dev/shm")  # noqa: S108 - where torch's workers put tensors on Linux
_PREFETCHED: Final = 2  # batches of each worker, torch's default
IMAGES: Final = 1 + MAX_REGIONS  # for the image encoder, of a sample


class BadSample(NamedTuple):
    """A sample that can't be trained on. shard: the name of its tar. reason: for people."""

    key: str
    shard: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """A micro-batch of B samples. position: of its first sample. keys: of the samples.
    references: keys of the samples that give their conditions, their own except in pairs.

    bad: samples that can't be read; valid: (B,) bool, False at their places, where the other
    tensors hold a blank sample. pixels: (B, 3, H, W) uint8. masks: (B, H, W) uint8, see
    `model.pixels`. clip_images: (n, 3, S, S) uint8, those that are shown to the image encoder;
    image_rows: (n,) int64, their rows among 6·B, which are for each sample the photograph and its
    five regions. sizes: (B, 6) int64, see `model.pixels.size_condition`. moments: (B, 8, h, w),
    hidden: (n, tokens, V), see `train.data.TrainBatch`. texts, encoded_texts, text_rows: where the
    texts' states come from, see `train.texts.TextPlaces`. The other fields are those of
    `ConditionBatch`.
    """

    position: int
    keys: tuple[str, ...]
    references: tuple[str, ...]
    bad: tuple[BadSample, ...]
    valid: Tensor
    pixels: Tensor
    masks: Tensor
    clip_images: Tensor
    image_rows: Tensor
    sizes: Tensor
    input_ids: Tensor
    input_ids_2: Tensor
    token_mask: Tensor
    token_idx: Tensor
    token_valid: Tensor
    identity: Tensor
    encoded_texts: Tensor
    text_rows: Tensor
    texts: Tensor | None = None
    moments: Tensor | None = None
    hidden: Tensor | None = None

    def to(self, device: torch.device | str) -> PackedBatch:
        """Returns the batch with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """Returns the batch in pinned memory. The DataLoader calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> PackedBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {
            name: function(value) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)  # type: ignore[arg-type]


def packed(
    conditions: ConditionBatch,
    pixels: Tensor,
    sizes: Tensor,
    bad: list[BadSample | None],
    *,
    moments: list[Tensor],
    hidden: list[Tensor],
    texts: list[Tensor | None],
    empty_text: Tensor,
    references: tuple[str, ...],
    position: int,
) -> PackedBatch:
    """Packs conditions and training images (B, 3, H, W) uint8. sizes: (B, 6) int64. bad: for each
    sample, why it can't be trained on; None if it can. moments, hidden: features of each sample,
    see `train.batch_maker.Prepared`; [] if they aren't read. texts: the states of each sample's
    text; None where they aren't known. empty_text: ids of the empty text, (2, 77). references:
    keys.
    """
    images = torch.cat((conditions.photo[:, None], conditions.region_images), dim=1).flatten(0, 1)
    shown = torch.cat((conditions.has_photo[:, None], conditions.token_valid), dim=1).flatten()
    # selected on the CPU: on a GPU, the host would have to wait for their number
    rows = shown.nonzero().flatten()
    places = text_places(text_ids(conditions.input_ids, conditions.input_ids_2), empty_text, texts)
    return PackedBatch(
        position=position,
        keys=conditions.keys,
        references=references,
        bad=tuple(each for each in bad if each),
        valid=torch.tensor([each is None for each in bad]),
        pixels=pixels,
        masks=conditions.masks,
        clip_images=images[rows],
        image_rows=rows,
        sizes=sizes,
        input_ids=conditions.input_ids,
        input_ids_2=conditions.input_ids_2,
        token_mask=conditions.token_mask,
        token_idx=conditions.token_idx,
        token_valid=conditions.token_valid,
        identity=conditions.identity,
        encoded_texts=places.encoded,
        text_rows=places.rows,
        texts=places.stored,
        moments=torch.stack(moments) if moments else None,
        hidden=_shown(hidden, rows) if hidden else None,
    )


def _shown(hidden: list[Tensor], rows: Tensor) -> Tensor:
    """Returns the features of the images in these rows, (n, tokens, V)."""
    places = [divmod(row, IMAGES) for row in rows.tolist()]
    if not places:
        return hidden[0][:0]
    return torch.stack([hidden[sample][image] for sample, image in places])


def check_shared_memory(
    *,
    size: int,
    workers: int,
    unread: int = 0,
    resolution: int,
    side: int,
    features: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Raises ConfigError if the batches of the workers of all processes on this machine don't fit
    into the shared memory that is free.

    size: samples of a micro-batch. unread: micro-batches that a process itself has there.
    resolution, side: of the training images and of those for the image encoder, in pixels. Images
    in buckets have no more pixels than the square. features: kind → bytes of a sample, of those
    that are read.
    """
    if not workers or not _SHARED.is_dir():
        return
    images = {"vae": 3 * resolution**2, "image": 3 * IMAGES * side**2, **features}
    sample = resolution**2 + sum(images.values()) + 8_192
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = sample * size * (workers * _PREFETCHED + unread) * processes
    free = shutil.disk_usage(_SHARED).free
    if needed > free:
        raise ConfigError(
            f"num_workers={workers} and micro_batch_size={size} need {needed / 1e6:,.0f} MB of "
            f"shared memory, and {_SHARED} has {free / 1e6:,.0f} MB free. Lower num_workers (0 "
            "reads samples in the training process) or micro_batch_size, or give the container "
            f"more, as with `docker run --shm-size={-(-2 * needed // 10**9)}g`."
        )
