"""Micro-batches: prepared from records by the loader's workers, and completed on the device."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.errors import ShardError
from model.conditions import Conditions, DropRates, build_conditions, collate, drop_conditions
from model.pixels import clip_normalised, training_image, unpacked_masks, vae_pixels
from model.spec import TOKEN_LIMIT, ModelSpec
from model.tokens import SECOND_PAD, empty_ids
from stages.record import IDENTITY_DIM, Record
from stages.regions import MAX_REGIONS, Mode
from train import draws
from train.mixture import Mixture
from train.order import SampleOrder
from train.packing import IMAGES, BadSample, PackedBatch, packed

Records = dict[int, Record | ShardError]  # by the samples' numbers

_UNIT_NORM = 1e-3  # largest deviation; embeddings are stored in float32 and normalised


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """A micro-batch of B samples on the device, with all random numbers that a step needs except
    the loss mask.

    keys: of the samples. references: keys of the samples that give their conditions, their own
    except in pairs.

    valid: (B,) bool, False for a blank sample in the place of one that can't be read.
    pixels: (B, 3, R, R) in [-1, 1], the images to learn.
    clip_images: (n, 3, S, S), the CLIP-normalised images that are not zero; image_rows: (n,)
    int64, their rows among 6·B, which are for each sample the photograph and its five regions.
    image_names, pixel_names: for each of clip_images and of pixels, a name that images of other
    content don't have; None for a blank sample's.
    latent_noise: (B, 4, h, w), for sampling the VAE's posterior; noise: (B, 4, h, w), the noise to
    predict. timesteps: (B,) int64. The other fields are those of `model.conditions.ConditionBatch`.
    """

    position: int
    keys: tuple[str, ...]
    references: tuple[str, ...]
    valid: Tensor
    pixels: Tensor
    clip_images: Tensor
    image_rows: Tensor
    image_names: tuple[Hashable, ...]
    pixel_names: tuple[Hashable, ...]
    input_ids: Tensor
    input_ids_2: Tensor
    token_mask: Tensor
    token_idx: Tensor
    token_valid: Tensor
    region_masks: Tensor
    foreground: Tensor
    identity: Tensor
    latent_noise: Tensor
    noise: Tensor
    timesteps: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """What turns records into micro-batches.

    resolution: side of the training images, in pixels. latent_shape: (4, h, w). timesteps: number
    of the noise schedule's. cache_size: number of prepared samples and pairs, the first ones read,
    that stay in memory, for small data sets with many epochs. verify: compare samples with their
    digests.
    """

    tokenizer: Any
    spec: ModelSpec
    mode: Mode
    resolution: int
    latent_shape: tuple[int, int, int]
    timesteps: int
    drop: DropRates
    seed: int
    tokenizer_2: Any = None
    cache_size: int = 0
    verify: bool = True


# The numbers of a sample and of its reference, which are the same except in pairs.
Pair = tuple[int, int]
# A sample as it is cached: its conditions, its image (3, R, R) uint8, and why it is bad.
Prepared = tuple[Conditions, Tensor, BadSample | None]


class BatchMaker:
    """Makes the micro-batch of a range of positions. Runs in the loader's worker processes."""

    def __init__(self, mixture: Mixture, order: SampleOrder, preparation: Preparation) -> None:
        self._mixture, self._order, self._preparation = mixture, order, preparation
        self._pairs = mixture.pairs(order)
        self._cache: dict[Pair, Prepared] = {}

    def fetch(self, positions: range) -> Records:
        """Reads the samples of these positions that aren't in the cache. Threads may call it while
        `make` prepares others. Raises PipelineError for a fault that isn't a sample's.
        """
        missing = (pair for pair in self._pairs_at(positions) if pair not in self._cache)
        numbers = sorted({number for pair in missing for number in pair})
        records = self._mixture.records(numbers, verify=self._preparation.verify)
        return dict(zip(numbers, records, strict=True))

    def make(self, positions: range, records: Records) -> PackedBatch:
        """Makes the micro-batch from what `fetch` returned for it."""
        pairs = self._pairs_at(positions)
        samples = self._samples(pairs, records)
        prep, seed = self._preparation, self._preparation.seed
        conditions = drop_conditions(
            collate([sample for sample, _, _ in samples]),
            torch.tensor(
                [draws.uniform(seed, "drop", position) for position in positions],
                dtype=torch.float64,
            ),
            prep.drop,
            prep.tokenizer,
        )
        return packed(
            conditions,
            torch.stack([pixels for _, pixels, _ in samples]),
            [bad for _, _, bad in samples],
            references=tuple(self._mixture.key(reference) for _, reference in pairs),
            position=positions.start,
        )

    def __call__(self, positions: range) -> PackedBatch:
        return self.make(positions, self.fetch(positions))

    def _pairs_at(self, positions: range) -> list[Pair]:
        return [(self._order.sample(each), self._pairs.reference(each)) for each in positions]

    def _samples(self, pairs: list[Pair], records: Records) -> list[Prepared]:
        """Returns the prepared samples, from the cache or from their records."""
        missing = [pair for pair in dict.fromkeys(pairs) if pair not in self._cache]
        prepared = {pair: self._prepare(pair, records) for pair in missing}
        for pair in missing[: max(0, self._preparation.cache_size - len(self._cache))]:
            self._cache[pair] = prepared[pair]
        return [prepared[each] if each in prepared else self._cache[each] for each in pairs]

    def _prepare(self, pair: Pair, records: Records) -> Prepared:
        number, reference = pair
        try:
            shown = None if reference == number else _usable(records[reference])
            conditions, pixels = self._build(_usable(records[number]), shown)
        except (ShardError, ValueError, OSError) as error:  # Pillow's errors are OSErrors
            if reference != number:
                alone = self._prepare((number, number), records)
                if alone[2] is not None:
                    return alone
            return self._blank(number, bad=reference, reason=str(error))
        return conditions, pixels, None

    def _blank(self, number: int, *, bad: int, reason: str) -> Prepared:
        prep, mixture = self._preparation, self._mixture
        conditions = blank_conditions(
            prep.tokenizer, prep.spec, key=mixture.key(number), resolution=prep.resolution
        )
        image = torch.zeros(3, prep.resolution, prep.resolution, dtype=torch.uint8)
        return conditions, image, BadSample(mixture.key(bad), mixture.shard_of(bad), reason)

    def _build(self, record: Record, reference: Record | None) -> tuple[Conditions, Tensor]:
        prep = self._preparation
        conditions = build_conditions(
            record,
            prep.tokenizer,
            prep.spec,
            prep.mode,
            resolution=prep.resolution,
            tokenizer_2=prep.tokenizer_2,
            reference=reference,
        )
        return conditions, training_image(record, prep.resolution)


def _usable(record: Record | ShardError) -> Record:
    """Returns the record. Raises the error in its place, or ValueError for an identity that is not
    a finite vector of unit norm.
    """
    if isinstance(record, ShardError):
        raise record
    if record.identity is not None:
        norm = float(np.linalg.norm(record.identity.astype(np.float64)))
        if not abs(norm - 1) <= _UNIT_NORM:  # also if it is NaN
            raise ValueError(f"the identity embedding has norm {norm:g}, expected 1")
    return record


def blank_conditions(tokenizer: Any, spec: ModelSpec, *, key: str, resolution: int) -> Conditions:
    """Returns the conditions of a sample without text, regions and identity: all its tensors are
    zero, except for the token ids. It takes the place of one that can't be read.
    """
    image = torch.zeros(3, spec.vision_size, spec.vision_size, dtype=torch.uint8)
    return Conditions(
        key=key,
        text="",
        regions=(),
        dropped=(),
        input_ids=empty_ids(tokenizer),
        input_ids_2=empty_ids(tokenizer, pad_id=SECOND_PAD),
        token_mask=torch.zeros(TOKEN_LIMIT, dtype=torch.bool),
        token_idx=torch.zeros(MAX_REGIONS, dtype=torch.int64),
        token_valid=torch.zeros(MAX_REGIONS, dtype=torch.bool),
        photo=image,
        has_photo=torch.tensor(False),
        region_images=image.expand(MAX_REGIONS, -1, -1, -1),
        masks=torch.zeros(resolution, resolution, dtype=torch.uint8),
        identity=torch.zeros(IDENTITY_DIM),
    )


def unpacked(
    batch: PackedBatch, preparation: Preparation, device: torch.device | str
) -> TrainBatch:
    """Returns a packed micro-batch on the device, with its random numbers.

    Nothing is copied with a plain `to`, which would wait for all that the GPU still has to do.
    """
    positions = range(batch.position, batch.position + len(batch.keys))
    shape, seed = preparation.latent_shape, preparation.seed
    normal = {
        name: torch.stack([draws.normal(shape, seed, name, position) for position in positions])
        for name in ("latent_noise", "noise")
    }
    timesteps = [
        draws.integer(preparation.timesteps, seed, "timestep", position) for position in positions
    ]
    pairs = [*zip(batch.keys, batch.references, strict=True)]
    places = [divmod(row, IMAGES) for row in batch.image_rows.tolist()]
    moved = batch.to(device)
    region_masks, foreground = unpacked_masks(moved.masks)
    return TrainBatch(
        position=batch.position,
        keys=batch.keys,
        references=batch.references,
        valid=moved.valid,
        pixels=vae_pixels(moved.pixels),
        clip_images=clip_normalised(moved.clip_images),
        image_rows=moved.image_rows,
        image_names=tuple((pairs[sample], image) for sample, image in places),
        pixel_names=tuple(
            key if valid else None
            for key, valid in zip(batch.keys, batch.valid.tolist(), strict=True)
        ),
        input_ids=moved.input_ids,
        input_ids_2=moved.input_ids_2,
        token_mask=moved.token_mask,
        token_idx=moved.token_idx,
        token_valid=moved.token_valid,
        region_masks=region_masks,
        foreground=foreground,
        identity=moved.identity,
        timesteps=_moved(torch.tensor(timesteps, dtype=torch.int64), device),
        **{name: _moved(value, device) for name, value in normal.items()},
    )


def _moved(values: Tensor, device: torch.device | str) -> Tensor:
    """Returns the values on the device, without waiting for it."""
    pinned = values.pin_memory() if torch.device(device).type == "cuda" else values
    return pinned.to(device, non_blocking=True)
