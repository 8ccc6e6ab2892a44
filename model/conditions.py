"""Conditions: the model's inputs for one record, as CPU tensors.

Training and inference both call `build_conditions`, so a record read from a shard and the record
that inference makes of the same photograph give equal tensors. Only the text differs: a caption in
training, a prompt in inference.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from model.pixels import FOREGROUND, Size, clip_image, clip_normalised, packed_masks, unpacked_masks
from model.prompt import MarkedText, inference_text, training_text
from model.spec import ModelSpec
from model.tokens import SECOND_PAD, empty_ids, text_tokens
from stages.record import IDENTITY_DIM, Record
from stages.regions import MAX_REGIONS, Mask, Mode, foreground_mask, region_masks

# Margin on every side of the square that region images are cropped to, as a share of the larger
# side of the regions' bounding box.
_HEAD_MARGIN: Final = 0.1


class _AsRead:
    """What the models read of the images and masks of conditions, float32. A batch has a leading
    axis B. Of a slot that isn't used, and of a photograph that isn't shown, all values are zero; as
    in the reference, that is not black.
    """

    __slots__ = ()
    photo: Tensor
    has_photo: Tensor
    region_images: Tensor
    masks: Tensor
    token_valid: Tensor

    @property
    def clip_pixels(self) -> Tensor:
        """The photograph, CLIP-normalised, (3, S, S)."""
        shown = self.has_photo[..., None, None, None]
        return torch.where(shown, clip_normalised(self.photo), 0.0)

    @property
    def region_pixels(self) -> Tensor:
        """The region images, CLIP-normalised, (5, 3, S, S)."""
        shown = self.token_valid[..., None, None, None]
        return torch.where(shown, clip_normalised(self.region_images), 0.0)

    @property
    def region_masks(self) -> Tensor:
        """The regions' masks, (5, H, W), 0 or 1."""
        return unpacked_masks(self.masks)[0]

    @property
    def foreground(self) -> Tensor:
        """The foreground's mask, (H, W), 0 or 1."""
        return unpacked_masks(self.masks)[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions(_AsRead):
    """The inputs of one sample. H, W = sides of the training image, S = input side of the image
    encoder, in pixels.

    Up to five regions get a slot; slot i is entry i of every tensor with a leading 5.

    key: the record's. text: with marks. regions: names of the slots' regions, in order. shown:
    names of all regions of the photograph, in order. dropped: (region, reason) of the regions
    without a slot.
    input_ids: (77,) int64. input_ids_2: the same text for a second text encoder.
    token_mask: (77,) bool, True on the nouns that a region is fused into.
    token_idx: (5,) int64, position of each slot's noun. token_valid: (5,) bool, whether the slot
    is used; where it is False, the slot's image isn't shown.
    photo: (3, S, S) uint8. has_photo: () bool, whether it is shown to the image encoder.
    region_images: (5, 3, S, S) uint8. masks: (H, W) uint8, see `model.pixels`.
    identity: (512,) float32, unit norm.
    """

    key: str
    text: str
    regions: tuple[str, ...]
    shown: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...]
    input_ids: Tensor
    input_ids_2: Tensor
    token_mask: Tensor
    token_idx: Tensor
    token_valid: Tensor
    photo: Tensor
    has_photo: Tensor
    region_images: Tensor
    masks: Tensor
    identity: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionBatch(_AsRead):
    """Stacked conditions: the tensors of `Conditions` with a leading axis B."""

    keys: tuple[str, ...]
    texts: tuple[str, ...]
    input_ids: Tensor
    input_ids_2: Tensor
    token_mask: Tensor
    token_idx: Tensor
    token_valid: Tensor
    photo: Tensor
    has_photo: Tensor
    region_images: Tensor
    masks: Tensor
    identity: Tensor

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    def to(self, device: torch.device | str) -> ConditionBatch:
        """Returns the batch with every tensor on `device`."""
        tensors = {name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS}
        return replace(self, **tensors)


_TENSORS: Final = tuple(
    field.name for field in fields(ConditionBatch) if field.name not in ("keys", "texts")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DropRates:
    """Probabilities of dropping a sample's text, its identity, or both; their sum is at most 1.
    region: that of dropping a region, for each of a sample's regions by itself.

    Raises ValueError for rates outside of that. With `legacy=True` dropping works as in the
    reference: at the rate `both`, text and photograph are dropped together, the identity embedding
    never, so no sample trains the unconditional branch.
    """

    text: float = 0.05
    identity: float = 0.05
    both: float = 0.05
    region: float = 0.0
    legacy: bool = False

    def __post_init__(self) -> None:
        rates = (self.text, self.identity, self.both)
        if min(rates) < 0 or sum(rates) > 1:
            raise ValueError(
                f"drop rates (text, identity, both) are {rates}; "
                "expected numbers in [0, 1] that sum to at most 1"
            )
        if not 0 <= self.region <= 1:
            raise ValueError(f"the drop rate of regions is {self.region}; expected 0 to 1")


def build_conditions(
    record: Record,
    tokenizer: Any,
    spec: ModelSpec,
    mode: Mode,
    *,
    prompt: str | None = None,
    resolution: int | Size,
    tokenizer_2: Any = None,
    reference: Record | None = None,
    images: bool = True,
) -> Conditions:
    """Builds the conditions of a record that has an image, a label map and an identity.

    prompt: the user's prompt; None builds the conditions of a training sample, whose text is the
    record's captions. tokenizer: a CLIP tokenizer with the marks added (`model.prompt.add_marks`).
    tokenizer_2: SDXL's second one, read in legacy mode only. resolution: of the masks, see
    `model.pixels.sides`. reference: a record of the same person. Then photograph, region images and
    identity are the reference's, text and masks the record's, and a region that one of the two
    lacks has no slot. images: make photograph and region images, for the image encoder; without,
    they have no pixels. Raises ValueError if one of the records lacks one of the three.
    """
    photo, labels, identity = _decode(record)
    masks = shown_masks = region_masks(labels, mode)
    if reference is not None:
        photo, shown_labels, identity = _decode(reference)
        shown_masks = region_masks(shown_labels, mode)
    regions = tuple(name for name in masks if name in shown_masks)
    tokens = text_tokens(
        _text_of(record, regions, tokenizer, spec, mode, prompt), tokenizer, mode, tokenizer_2
    )
    side = spec.vision_size if images else 0
    slots = {name: shown_masks[name] for name in tokens.regions} if images else {}
    pictures = region_images(photo, slots, shown_masks, mode)
    return Conditions(
        key=record.key,
        text=tokens.text,
        regions=tokens.regions,
        shown=(*shown_masks,),
        dropped=tokens.dropped,
        input_ids=tokens.input_ids,
        input_ids_2=tokens.input_ids_2,
        token_mask=tokens.token_mask,
        token_idx=tokens.token_idx,
        token_valid=tokens.token_valid,
        photo=clip_image(photo, side) if images else torch.zeros(3, 0, 0, dtype=torch.uint8),
        has_photo=torch.tensor(True),
        region_images=_padded([clip_image(image, side) for image in pictures], (3, side, side)),
        masks=packed_masks(
            [masks[name] for name in tokens.regions], foreground_mask(labels, mode), resolution
        ),
        identity=torch.from_numpy(identity.copy()),
    )


def photo_images(record: Record, spec: ModelSpec, mode: Mode) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the photograph (3, S, S) uint8, and each of its regions' images, in order, scaled and
    cropped for the image encoder. Raises ValueError as `build_conditions` does.
    """
    photo, labels, _ = _decode(record)
    masks = region_masks(labels, mode)
    images = region_images(photo, masks, masks, mode)
    side = spec.vision_size
    regions = {name: clip_image(image, side) for name, image in zip(masks, images, strict=True)}
    return clip_image(photo, side), regions


def collate(samples: Sequence[Conditions]) -> ConditionBatch:
    """Stacks conditions of equal sizes, in order."""
    return ConditionBatch(
        keys=tuple(sample.key for sample in samples),
        texts=tuple(sample.text for sample in samples),
        **{name: torch.stack([getattr(sample, name) for sample in samples]) for name in _TENSORS},
    )


def drop_conditions(
    batch: ConditionBatch, draws: Tensor, rates: DropRates, tokenizer: Any
) -> ConditionBatch:
    """Returns the batch with the text or the identity of some samples dropped.

    That trains the unconditional branch of classifier-free guidance. A dropped identity is a zero
    embedding, without photograph and regions. A dropped text is empty, and therefore has no nouns
    to fuse regions into.

    draws: (B,) in [0, 1), one per sample. The caller draws them from each sample's own seed, so
    what is dropped doesn't depend on the composition of the batch.
    """
    draws = draws.to(batch.input_ids.device)
    no_text = draws < rates.text
    no_identity = (draws >= rates.text) & (draws < rates.text + rates.identity)
    neither = (draws >= rates.text + rates.identity) & (
        draws < rates.text + rates.identity + rates.both
    )
    if rates.legacy:
        return _drop_legacy(batch, draws < rates.both, tokenizer)
    batch = _without_text(batch, no_text | neither, tokenizer)
    return _without_identity(batch, no_identity | neither)


def _drop_legacy(batch: ConditionBatch, drop: Tensor, tokenizer: Any) -> ConditionBatch:
    batch = _without_text(batch, drop, tokenizer)
    return replace(batch, has_photo=batch.has_photo & ~drop)


def _without_text(batch: ConditionBatch, drop: Tensor, tokenizer: Any) -> ConditionBatch:
    empty = empty_ids(tokenizer).to(batch.input_ids)
    empty_2 = empty_ids(tokenizer, pad_id=SECOND_PAD).to(batch.input_ids)
    batch = replace(
        batch,
        input_ids=torch.where(drop[:, None], empty, batch.input_ids),
        input_ids_2=torch.where(drop[:, None], empty_2, batch.input_ids_2),
    )
    return _without_regions(batch, drop)


def _without_identity(batch: ConditionBatch, drop: Tensor) -> ConditionBatch:
    batch = replace(
        batch, identity=_zeroed(batch.identity, drop), has_photo=batch.has_photo & ~drop
    )
    return _without_regions(batch, drop)


def _without_regions(batch: ConditionBatch, drop: Tensor) -> ConditionBatch:
    visible = torch.where(drop, 1 << FOREGROUND, 255).to(torch.uint8)
    return replace(
        batch,
        token_mask=_zeroed(batch.token_mask, drop),
        token_idx=_zeroed(batch.token_idx, drop),
        token_valid=_zeroed(batch.token_valid, drop),
        masks=batch.masks & visible[:, None, None],
    )


def drop_regions(batch: ConditionBatch, drop: Tensor) -> ConditionBatch:
    """Returns the batch without some of the regions: their nouns keep the text's tokens.

    drop: (B, 5) bool. Slots that aren't used stay as they are.
    """
    drop = drop.to(batch.token_valid.device) & batch.token_valid
    length = batch.token_mask.shape[1]
    nouns = (F.one_hot(batch.token_idx, length).bool() & drop[..., None]).any(1)
    bits = 1 << torch.arange(drop.shape[1], device=drop.device)
    hidden = (drop * bits).sum(1).to(torch.uint8)
    return replace(
        batch,
        token_mask=batch.token_mask & ~nouns,
        token_valid=batch.token_valid & ~drop,
        masks=batch.masks & ~hidden[:, None, None],
    )


def _zeroed(values: Tensor, drop: Tensor) -> Tensor:
    return values.masked_fill(drop.view(-1, *[1] * (values.ndim - 1)), 0)


def region_images(
    photo: Image.Image, slots: dict[str, Mask], masks: dict[str, Mask], mode: Mode
) -> list[Image.Image]:
    """Returns for each slot the photograph with everything outside the slot's mask black, RGB.

    slots: masks of the fused regions; masks: those of all the record's regions. In legacy mode the
    images have the photograph's frame, so the image encoder's centre crop may cut a region off. In
    corrected mode all are cropped to one square around all regions: a small or off-centre face
    fills it, and the regions keep their relative positions.
    """
    whole = mode == "legacy" or not slots
    box = (0, 0, *photo.size) if whole else _head_square(masks, photo.size)
    shown = photo.crop(box)
    black = Image.new("RGB", shown.size)
    images = []
    for mask in slots.values():
        alpha = Image.fromarray(mask.astype(np.uint8) * 255).resize(photo.size).crop(box)
        images.append(Image.composite(shown, black, alpha))
    return images


def _head_square(masks: dict[str, Mask], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns the square around all masks as (left, top, right, bottom).

    size: (width, height) of the photograph, in whose pixels the square is given. The square may
    extend beyond the photograph.
    """
    union = np.logical_or.reduce(list(masks.values()))
    rows, columns = np.flatnonzero(union.any(1)), np.flatnonzero(union.any(0))
    scale_x, scale_y = size[0] / union.shape[1], size[1] / union.shape[0]
    left, right = columns[0] * scale_x, (columns[-1] + 1) * scale_x
    top, bottom = rows[0] * scale_y, (rows[-1] + 1) * scale_y
    half = max(right - left, bottom - top) * (0.5 + _HEAD_MARGIN)
    x, y = round((left + right) / 2 - half), round((top + bottom) / 2 - half)
    side = max(1, round(2 * half))
    return x, y, x + side, y + side


def _decode(record: Record) -> tuple[Image.Image, npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Returns a record's RGB image, label map (H, W) and identity (512,)."""
    if not record.image or not record.parsing or record.identity is None:
        missing = [name for name in ("image", "parsing", "identity") if not _has(record, name)]
        raise ValueError(
            f"record {record.key} ({record.source}) has no {', '.join(missing)}; run the stages "
            "that make them first"
        )
    if record.identity.shape != (IDENTITY_DIM,):
        raise ValueError(
            f"record {record.key}: identity has shape {record.identity.shape}, expected "
            f"({IDENTITY_DIM},)"
        )
    with Image.open(io.BytesIO(record.image)) as file:
        photo = file.convert("RGB")
    with Image.open(io.BytesIO(record.parsing)) as file:
        labels = np.array(file, dtype=np.uint8)
    return photo, labels, record.identity.astype(np.float32, copy=False)


def _has(record: Record, name: str) -> bool:
    value = getattr(record, name)
    return value is not None and len(value) > 0


def _text_of(
    record: Record,
    regions: Sequence[str],
    tokenizer: Any,
    spec: ModelSpec,
    mode: Mode,
    prompt: str | None,
) -> MarkedText:
    if prompt is None:
        return training_text(record.caption, record.face_caption, regions, tokenizer, spec, mode)
    return inference_text(prompt, record.face_caption, regions, tokenizer, spec, mode)


def _padded(slots: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Stacks the slots' images and pads them with zeros to MAX_REGIONS."""
    empty = torch.zeros(shape, dtype=torch.uint8)
    return torch.stack([*slots, *[empty] * (MAX_REGIONS - len(slots))])
