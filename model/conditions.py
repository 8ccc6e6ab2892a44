"""Conditions: all that one record tells the model, as CPU tensors; the only way from a record to
the model.

Training and inference both come through `build_conditions`, so a record read from a shard and the
record that inference makes of the same photograph give equal tensors. What differs is the text
alone: a caption or a prompt.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from model.prompt import MarkedText, fused_regions, inference_text, tokenize_marked, training_text
from model.spec import TOKEN_LIMIT, ModelSpec
from stages.record import IDENTITY_DIM, Record
from stages.regions import MAX_REGIONS, Mask, Mode, foreground_mask, region_masks

_SECOND_PAD: Final = 0  # SDXL's second tokenizer pads with "!", not with EOS
# of the regions' box, on every side of the square that region pictures are cut to
_HEAD_MARGIN: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """One sample. R = resolution, S = the image tower's side, both in pixels.

    input_ids: (77,) int64. input_ids_2: the same text for a second text encoder. token_mask: (77,)
    bool, True on fused nouns. token_idx: (5,) int64, their positions, 0 where token_valid (5,) bool
    is False; slot i's picture is region_pixels[i] of (5, 3, S, S), CLIP-normalised, zero where not
    valid, and its mask region_masks[i] of (5, R, R) in [0, 1]. foreground: (R, R) in [0, 1].
    clip_pixels: (3, S, S), the whole photograph. identity: (512,) unit norm. text: with marks.
    regions: the slots' regions in order; dropped: (region, reason) of those that got no slot.
    """

    key: str
    text: str
    regions: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...]
    input_ids: Tensor
    input_ids_2: Tensor
    token_mask: Tensor
    token_idx: Tensor
    token_valid: Tensor
    region_pixels: Tensor
    region_masks: Tensor
    foreground: Tensor
    clip_pixels: Tensor
    identity: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionBatch:
    """Conditions stacked: every tensor has a leading axis B; see `Conditions` for the rest."""

    keys: tuple[str, ...]
    texts: tuple[str, ...]
    input_ids: Tensor
    input_ids_2: Tensor
    token_mask: Tensor
    token_idx: Tensor
    token_valid: Tensor
    region_pixels: Tensor
    region_masks: Tensor
    foreground: Tensor
    clip_pixels: Tensor
    identity: Tensor

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ConditionBatch:
        """Every tensor on `device`; those of floating point in `dtype`, the identity and the masks
        stay float32.
        """
        moved: dict[str, Tensor] = {}
        for name in _TENSORS:
            value: Tensor = getattr(self, name)
            pixels = name in ("region_pixels", "clip_pixels")
            moved[name] = value.to(device, dtype if pixels else None, non_blocking=True)
        return replace(self, **moved)  # type: ignore[arg-type]


_TENSORS: Final = tuple(
    field.name for field in fields(ConditionBatch) if field.name not in ("keys", "texts")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DropRates:
    """Probabilities of dropping the text, the identity, or both, of a sample; their sum is at most
    1.

    The reference drops text and whole photograph together in 10 % of samples, but never the
    identity embedding nor the regions, so its unconditional branch was never trained: `legacy=True`
    repeats that, at the rate `both`.
    """

    text: float = 0.05
    identity: float = 0.05
    both: float = 0.05
    legacy: bool = False

    def __post_init__(self) -> None:
        rates = (self.text, self.identity, self.both)
        if min(rates) < 0 or sum(rates) > 1:
            raise ValueError(f"drop rates must lie in [0, 1] and sum to at most 1, not {rates}")


def build_conditions(
    record: Record,
    tokenizer: Any,
    spec: ModelSpec,
    mode: Mode,
    *,
    prompt: str | None = None,
    resolution: int,
    tokenizer_2: Any = None,
) -> Conditions:
    """Conditions of a record that has image, parsing and identity. Without a prompt: those of a
    training sample.

    tokenizer: a CLIP tokenizer that knows the marks (`model.prompt.add_marks`). tokenizer_2: SDXL's
    second one; only the ids of legacy mode need it. Raises ValueError if the record lacks
    something.
    """
    photo, labels, identity = _opened(record)
    masks = region_masks(labels, mode)
    text = _text_of(record, tuple(masks), tokenizer, spec, mode, prompt)
    tokens, slots, dropped = fused_regions(text, tokenizer, mode)
    mask = torch.zeros(TOKEN_LIMIT, dtype=torch.bool)
    mask[list(tokens.positions)] = True
    idx = torch.zeros(MAX_REGIONS, dtype=torch.int64)
    idx[: len(slots)] = torch.tensor(tokens.positions, dtype=torch.int64)
    side = spec.vision_size
    pictures = region_pictures(photo, {name: masks[name] for name in slots}, masks, mode)
    return Conditions(
        key=record.key,
        text=text.text,
        regions=slots,
        dropped=dropped,
        input_ids=torch.tensor(tokens.ids, dtype=torch.int64),
        input_ids_2=_second_ids(text.text, tokens.ids, tokenizer, tokenizer_2, mode),
        token_mask=mask,
        token_idx=idx,
        token_valid=torch.arange(MAX_REGIONS) < len(slots),
        region_pixels=_padded(
            [_clip_normalised(picture, side) for picture in pictures], (3, side, side)
        ),
        region_masks=_padded(
            [_fit_mask(masks[name], resolution) for name in slots], (resolution, resolution)
        ),
        foreground=_fit_mask(foreground_mask(labels, mode), resolution),
        clip_pixels=_clip_normalised(photo, side),
        identity=torch.from_numpy(identity.copy()),
    )


def training_pixels(record: Record, resolution: int) -> Tensor:
    """The picture to be learnt, (3, R, R) in [-1, 1]: short side to R, then the centre, as the
    masks are cut.
    """
    with Image.open(io.BytesIO(record.image)) as opened:
        picture = _fit(opened.convert("RGB"), resolution)
    return torch.from_numpy(np.array(picture, np.float32)).permute(2, 0, 1) / 127.5 - 1.0


def collate(samples: Sequence[Conditions]) -> ConditionBatch:
    """Conditions of equal sizes, stacked in order."""
    return ConditionBatch(
        keys=tuple(sample.key for sample in samples),
        texts=tuple(sample.text for sample in samples),
        **{name: torch.stack([getattr(sample, name) for sample in samples]) for name in _TENSORS},
    )


def drop_conditions(
    batch: ConditionBatch, draws: Tensor, rates: DropRates, tokenizer: Any
) -> ConditionBatch:
    """The batch with some samples' text or identity taken away, so that guidance has something to
    guide away from.

    draws: (B,) in [0, 1), one per sample, which the caller makes from the sample's own seed: what
    is dropped then doesn't depend on the batch it came in. A dropped identity is a zero embedding
    with zero pixels and no regions; a dropped text is empty and so has no nouns to fuse regions
    into.
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
    return replace(batch, clip_pixels=_zeroed(batch.clip_pixels, drop))


def _without_text(batch: ConditionBatch, drop: Tensor, tokenizer: Any) -> ConditionBatch:
    empty = empty_ids(tokenizer).to(batch.input_ids)
    empty_2 = empty_ids(tokenizer, pad_id=_SECOND_PAD).to(batch.input_ids)
    batch = replace(
        batch,
        input_ids=torch.where(drop[:, None], empty, batch.input_ids),
        input_ids_2=torch.where(drop[:, None], empty_2, batch.input_ids_2),
    )
    return _without_regions(batch, drop)


def _without_identity(batch: ConditionBatch, drop: Tensor) -> ConditionBatch:
    batch = replace(
        batch, identity=_zeroed(batch.identity, drop), clip_pixels=_zeroed(batch.clip_pixels, drop)
    )
    return _without_regions(batch, drop)


def _without_regions(batch: ConditionBatch, drop: Tensor) -> ConditionBatch:
    names = ("token_mask", "token_idx", "token_valid", "region_pixels", "region_masks")
    return replace(batch, **{name: _zeroed(getattr(batch, name), drop) for name in names})  # type: ignore[arg-type]


def _zeroed(values: Tensor, drop: Tensor) -> Tensor:
    return values.masked_fill(drop.view(-1, *[1] * (values.ndim - 1)), 0)


def empty_ids(tokenizer: Any, *, pad_id: int | None = None) -> Tensor:
    """(77,) int64: the ids of an empty text."""
    return torch.tensor(
        tokenize_marked("", tokenizer, keep_eos=True, pad_id=pad_id).ids, dtype=torch.int64
    )


def region_pictures(
    photo: Image.Image, slots: dict[str, Mask], masks: dict[str, Mask], mode: Mode
) -> list[Image.Image]:
    """The photograph on black through each slot's mask, RGB.

    legacy: the whole frame, so the image tower's centre crop may cut a region off. corrected: cut
    to one square round all the record's regions (`masks`), so that a small or off-centre face fills
    it and parts keep their places.
    """
    black = Image.new("RGB", photo.size)
    pictures = []
    for mask in slots.values():
        alpha = Image.fromarray(mask.astype(np.uint8) * 255).resize(photo.size)
        pictures.append(Image.composite(photo, black, alpha))
    if mode == "legacy" or not slots:
        return pictures
    box = _head_square(masks, photo.size)
    return [picture.crop(box) for picture in pictures]


def _head_square(masks: dict[str, Mask], size: tuple[int, int]) -> tuple[int, int, int, int]:
    union = np.logical_or.reduce(list(masks.values()))
    rows, columns = np.flatnonzero(union.any(1)), np.flatnonzero(union.any(0))
    scale_x, scale_y = size[0] / union.shape[1], size[1] / union.shape[0]
    left, right = columns[0] * scale_x, (columns[-1] + 1) * scale_x
    top, bottom = rows[0] * scale_y, (rows[-1] + 1) * scale_y
    half = max(right - left, bottom - top) * (0.5 + _HEAD_MARGIN)
    x, y = round((left + right) / 2 - half), round((top + bottom) / 2 - half)
    side = max(1, round(2 * half))
    return x, y, x + side, y + side


def _opened(record: Record) -> tuple[Image.Image, npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    if not record.image or not record.parsing or record.identity is None:
        lacking = [name for name in ("image", "parsing", "identity") if not _has(record, name)]
        raise ValueError(
            f"record {record.key} ({record.source}) has no {', '.join(lacking)}; run those "
            "stages first"
        )
    if record.identity.shape != (IDENTITY_DIM,):
        raise ValueError(
            f"record {record.key}: identity is {record.identity.shape}, expected ({IDENTITY_DIM},)"
        )
    with Image.open(io.BytesIO(record.image)) as opened:
        photo = opened.convert("RGB")
    with Image.open(io.BytesIO(record.parsing)) as opened:
        labels = np.array(opened, dtype=np.uint8)
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


def _second_ids(
    text: str, ids: Sequence[int], tokenizer: Any, tokenizer_2: Any, mode: Mode
) -> Tensor:
    """legacy: the second tokenizer doesn't know the facial mark and spells it out, so its tokens
    are shifted (REFERENCE.md 7.3). corrected: the same tokens, so that both encoders' nouns stand
    at the same positions.
    """
    if mode == "legacy" and tokenizer_2 is not None:
        spelt = tokenizer_2.encode(text, verbose=False)[:TOKEN_LIMIT]
        return torch.tensor(
            [*spelt, *[_SECOND_PAD] * (TOKEN_LIMIT - len(spelt))], dtype=torch.int64
        )
    first_eos = (
        list(ids).index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else TOKEN_LIMIT
    )
    padding = [_SECOND_PAD] * (TOKEN_LIMIT - first_eos - 1)
    return torch.tensor([*ids[: first_eos + 1], *padding], dtype=torch.int64)


@lru_cache(maxsize=8)
def _clip_processor(size: int) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )


def _clip_normalised(picture: Image.Image, size: int) -> Tensor:
    pixels: Tensor = _clip_processor(size)(images=picture, return_tensors="pt").pixel_values[0]
    return pixels


def _padded(slots: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Slots stacked and filled up to MAX_REGIONS with zeros (after normalisation, as the reference
    does).
    """
    return torch.stack([*slots, *[torch.zeros(shape)] * (MAX_REGIONS - len(slots))])


def _fit(picture: Image.Image, side: int) -> Image.Image:
    width, height = picture.size
    scale = side / min(width, height)
    size = max(side, round(width * scale)), max(side, round(height * scale))
    resized = picture if size == picture.size else picture.resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return resized.crop((left, top, left + side, top + side))


def _fit_mask(mask: Mask, side: int) -> Tensor:
    picture = _fit(Image.fromarray(mask.astype(np.uint8) * 255), side)
    return torch.from_numpy(np.array(picture, np.float32)) / 255.0
