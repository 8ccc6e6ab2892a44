"""BatchMaker: prepares micro-batches from records, in the loader's workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from configs.errors import ShardError
from model.conditions import Conditions, build_conditions, collate, drop_conditions, drop_regions
from model.pixels import Size, fixed_size_condition, sides, size_condition, training_image
from model.spec import TOKEN_LIMIT, ModelSpec
from model.tokens import SECOND_PAD, empty_ids
from stages.record import IDENTITY_DIM, Record
from stages.regions import MAX_REGIONS
from train import draws
from train.data import Preparation
from train.features.reading import FeatureSet
from train.mixture import Mixture
from train.order import Order as RunOrder
from train.packing import BadSample, PackedBatch, packed
from train.texts import TextStates, empty_text_ids, text_ids

Records = dict[int, Record | ShardError]  # by the samples' numbers
Features = dict[int, Tensor | ShardError]
Texts = dict[int, TextStates | ShardError]
AnyFeatures = TypeVar("AnyFeatures", Tensor, TextStates)

_UNIT_NORM = 1e-3  # largest deviation; embeddings are stored in float32 and normalised

# The numbers of a sample and of its reference, which are the same except in pairs.
Pair = tuple[int, int]


class Prepared(NamedTuple):
    """A sample as it is cached. pixels: its image, (3, H, W) uint8. sizes: (6,) int64, see
    `model.pixels.size_condition`. moments: features of the image, (8, h, w). hidden: features of
    the images for the image encoder, (1 + slots, tokens, V): of the photograph and of each slot.
    text: features of the text, (77 · C + P,); None if they aren't read, or are of another text.
    bad: why it can't be trained on, if it can't.

    With moments, `pixels` has none, and with hidden, the images of the conditions.
    """

    conditions: Conditions
    pixels: Tensor
    sizes: Tensor
    moments: Tensor | None = None
    hidden: Tensor | None = None
    text: Tensor | None = None
    bad: BadSample | None = None


class Fetched(NamedTuple):
    """What a micro-batch is made of, by the samples' numbers. moments, hidden, texts: features of
    the kinds vae, image and text; empty if they aren't read.
    """

    records: Records
    moments: Features
    hidden: Features
    texts: Texts


class Order(Protocol):
    """Which sample is at a position."""

    def sample(self, position: int) -> int: ...


class References(Protocol):
    """Which sample gives the conditions at a position."""

    def reference(self, position: int) -> int: ...


class BatchMaker:
    """Makes the micro-batch of a range of positions. Runs in the loader's worker processes.

    features: by kind, those that are read. references: None: the mixture's
    pairs.
    """

    def __init__(
        self,
        mixture: Mixture,
        order: Order,
        preparation: Preparation,
        features: Mapping[str, FeatureSet] | None = None,
        references: References | None = None,
    ) -> None:
        self._mixture, self._order, self._preparation = mixture, order, preparation
        self._features = features or {}
        self._pairs = references or mixture.pairs(cast(RunOrder, order))
        self._cache: dict[Pair, Prepared] = {}
        self._empty_text = empty_text_ids(preparation.tokenizer)

    def fetch(self, positions: range) -> Fetched:
        """Reads the samples of these positions that aren't in the cache. Threads may call it while
        `make` prepares others. Raises PipelineError for a fault that isn't a sample's.
        """
        missing = [pair for pair in self._pairs_at(positions) if pair not in self._cache]
        numbers = sorted({number for pair in missing for number in pair})
        records = self._mixture.records(numbers, verify=self._preparation.verify)
        own = {number for number, _ in missing}
        return Fetched(
            dict(zip(numbers, records, strict=True)),
            self._read("vae", own),
            self._read("image", {reference for _, reference in missing}),
            self._read("text", own),
        )

    def _read(self, kind: str, numbers: set[int]) -> dict[int, Any]:
        if kind not in self._features:
            return {}
        return self._features[kind].read(sorted(numbers), verify=self._preparation.verify)

    def make(self, positions: range, fetched: Fetched) -> PackedBatch:
        """Makes the micro-batch from what `fetch` returned for it."""
        pairs = self._pairs_at(positions)
        samples = self._samples(pairs, fetched)
        prep, seed = self._preparation, self._preparation.seed
        conditions = drop_conditions(
            collate([sample.conditions for sample in samples]),
            torch.tensor(
                [draws.uniform(seed, "drop", position) for position in positions],
                dtype=torch.float64,
            ),
            prep.drop,
            prep.tokenizer,
        )
        if prep.drop.region:
            conditions = drop_regions(conditions, self._dropped_regions(positions))
        return packed(
            conditions,
            torch.stack([sample.pixels for sample in samples]),
            torch.stack([sample.sizes for sample in samples]),
            [sample.bad for sample in samples],
            moments=[sample.moments for sample in samples if sample.moments is not None],
            hidden=[sample.hidden for sample in samples if sample.hidden is not None],
            texts=[sample.text for sample in samples],
            empty_text=self._empty_text,
            references=tuple(self._mixture.key(reference) for _, reference in pairs),
            position=positions.start,
        )

    def _dropped_regions(self, positions: range) -> Tensor:
        """Returns which regions of the samples are left out, (B, 5) bool."""
        prep = self._preparation
        rows = [
            [
                draws.uniform(prep.seed, f"drop_region_{slot}", position) < prep.drop.region
                for slot in range(MAX_REGIONS)
            ]
            for position in positions
        ]
        return torch.tensor(rows)

    def __call__(self, positions: range) -> PackedBatch:
        return self.make(positions, self.fetch(positions))

    def _pairs_at(self, positions: range) -> list[Pair]:
        return [(self._order.sample(each), self._pairs.reference(each)) for each in positions]

    def _samples(self, pairs: list[Pair], fetched: Fetched) -> list[Prepared]:
        """Returns the prepared samples, from the cache or from what was fetched."""
        missing = [pair for pair in dict.fromkeys(pairs) if pair not in self._cache]
        prepared = {pair: self._prepare(pair, fetched) for pair in missing}
        for pair in missing[: max(0, self._preparation.cache_size - len(self._cache))]:
            self._cache[pair] = prepared[pair]
        return [prepared[each] if each in prepared else self._cache[each] for each in pairs]

    def _prepare(self, pair: Pair, fetched: Fetched) -> Prepared:
        number, reference = pair
        try:
            return self._build(pair, fetched)
        except (ShardError, ValueError, OSError) as error:  # Pillow's errors are OSErrors
            if reference != number:
                own = fetched._replace(hidden=self._read("image", {number}))
                alone = self._prepare((number, number), own)
                if alone.bad is not None:
                    return alone
            return self._blank(number, bad=reference, reason=str(error))

    def _blank(self, number: int, *, bad: int, reason: str) -> Prepared:
        prep, mixture = self._preparation, self._mixture
        width, height = size = prep.size(number)
        conditions = blank_conditions(
            prep.tokenizer, prep.spec, key=mixture.key(number), resolution=size
        )
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        fault = BadSample(mixture.key(bad), mixture.shard_of(bad), reason)
        moments = hidden = None
        if "vae" in self._features:
            image, moments = image[:, :0, :0], self._features["vae"].blank()
        if "image" in self._features:
            empty = conditions.photo[:, :0, :0]
            images = empty.expand(MAX_REGIONS, -1, -1, -1)
            conditions = replace(conditions, photo=empty, region_images=images)
            hidden = torch.zeros(0)  # a blank sample shows none
        sizes = fixed_size_condition(size)
        return Prepared(conditions, image, sizes, moments, hidden, bad=fault)

    def _build(self, pair: Pair, fetched: Fetched) -> Prepared:
        prep, (number, shown) = self._preparation, pair
        record = _usable(fetched.records[number])
        size = prep.size(number)
        reference = None if shown == number else _usable(fetched.records[shown])
        conditions = build_conditions(
            record,
            prep.tokenizer,
            prep.spec,
            prep.mode,
            resolution=size,
            prompt=prep.prompt,
            tokenizer_2=prep.tokenizer_2,
            reference=reference,
            images="image" not in self._features,
        )
        sizes = (
            size_condition(record, size, prep.mode)
            if prep.true_sizes
            else fixed_size_condition(size)
        )
        moments = hidden = None
        if "vae" in self._features:
            moments = _usable_features(fetched.moments[number])
            pixels = torch.zeros(3, 0, 0, dtype=torch.uint8)
        else:
            pixels = training_image(record, size)
        if "image" in self._features:
            hidden = _slots(_usable_features(fetched.hidden[shown]), conditions)
        text = None
        if "text" in self._features:
            may_differ = shown != number or prep.prompt is not None
            text = _text_of(_usable_features(fetched.texts[number]), conditions, may_differ)
        return Prepared(conditions, pixels, sizes, moments, hidden, text)


def _slots(states: Tensor, conditions: Conditions) -> Tensor:
    """Returns the states of the photograph and of each slot's region, (1 + slots, tokens, V).

    states: of the photograph and all its regions. Raises ValueError if they are of another number
    of regions.
    """
    if len(states) != 1 + len(conditions.shown):
        raise ValueError(
            f"there are features of {len(states) - 1} regions, and the photograph has "
            f"{len(conditions.shown)}. Run make features again."
        )
    rows = [conditions.shown.index(name) for name in conditions.regions]
    return states[[0, *(1 + row for row in rows)]]


def _text_of(features: TextStates, conditions: Conditions, may_differ: bool) -> Tensor | None:
    """Returns the states of the conditions' text; None if the features are of another one.

    may_differ: because of a prompt, or of a region that the reference lacks. Otherwise raises
    ValueError.
    """
    if torch.equal(features.ids, text_ids(conditions.input_ids, conditions.input_ids_2)):
        return features.states
    if may_differ:
        return None
    raise ValueError(
        "its features are of a text with other tokens, as of another version of this program. "
        "Delete the folders features/text-… of the data set, and run make features again."
    )


def _usable_features(features: AnyFeatures | ShardError) -> AnyFeatures:
    """Returns the features. Raises the error in their place."""
    if isinstance(features, ShardError):
        raise features
    return features


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


def blank_conditions(
    tokenizer: Any, spec: ModelSpec, *, key: str, resolution: int | Size
) -> Conditions:
    """Returns the conditions of a sample without text, regions and identity: all its tensors are
    zero, except for the token ids. It takes the place of one that can't be read.
    """
    image = torch.zeros(3, spec.vision_size, spec.vision_size, dtype=torch.uint8)
    width, height = sides(resolution)
    return Conditions(
        key=key,
        text="",
        regions=(),
        shown=(),
        dropped=(),
        input_ids=empty_ids(tokenizer),
        input_ids_2=empty_ids(tokenizer, pad_id=SECOND_PAD),
        token_mask=torch.zeros(TOKEN_LIMIT, dtype=torch.bool),
        token_idx=torch.zeros(MAX_REGIONS, dtype=torch.int64),
        token_valid=torch.zeros(MAX_REGIONS, dtype=torch.bool),
        photo=image,
        has_photo=torch.tensor(False),
        region_images=image.expand(MAX_REGIONS, -1, -1, -1),
        masks=torch.zeros(height, width, dtype=torch.uint8),
        identity=torch.zeros(IDENTITY_DIM),
    )
