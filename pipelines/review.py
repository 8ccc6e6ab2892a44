"""Review: what the trainer's own prompt code makes of a sample's texts, written down before anyone
trains on them.

A caption that names no region, or so long that every clause about the face is cut, trains nothing
of the face, and says nothing of it either. Here that is a figure and a verdict of each sample, and
a share of the whole run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cached_property
from typing import Any

from configs.errors import QualityError
from configs.quality import ReviewConfig
from model.prompt import (
    add_marks,
    fused_regions,
    named_regions,
    region_words,
    training_text,
    without_marks,
)
from model.spec import spec_named
from model.vocabulary import clip_tokenizer
from stages.backends.weights import Weights
from stages.base import RecordStage
from stages.codec import decode_labels
from stages.record import Record, Review, Status
from stages.regions import REGION_WORDS, Mode, region_masks, word_of
from stages.storage.commit import read_manifests, read_sidecar
from stages.storage.store import Store

_VOCABULARY = "clip_bpe"
_SCAFFOLD = ("Detail:", "Caption:")  # the trainer's own words, two tokens each


class ReviewStage(RecordStage):
    name = "review"
    version = 1
    requires = ("parsing", "caption", "face_caption")
    provides = ("review",)
    config: ReviewConfig

    def __init__(self, config: ReviewConfig, weights: Weights) -> None:
        super().__init__(config)
        self._weights = weights

    def weights(self) -> tuple[str, ...]:
        return (_VOCABULARY,)

    def digests(self) -> dict[str, str]:
        return {_VOCABULARY: self._weights.digest(_VOCABULARY)}

    @cached_property
    def _tokenizer(self) -> Any:
        return add_marks(clip_tokenizer(self._weights.fetch(_VOCABULARY)))

    def setup(self) -> None:
        assert self._tokenizer is not None

    def process_one(self, record: Record) -> Record:
        mode: Mode = self.config.mode
        regions = tuple(region_masks(decode_labels(record.parsing), mode))
        texts = (record.caption, record.face_caption)
        made = training_text(*texts, regions, self._tokenizer, spec_named(self.config.spec), mode)
        tokens, fused, unfused = fused_regions(made, self._tokenizer, mode)
        named = {word for text in texts for word in named_regions(text)}
        lengths = [self._length(text) for text in texts]
        kept = min(self._length(without_marks(made.text)), len(tokens.ids) - 2)
        own = sum(2 for word in _SCAFFOLD if word in made.text and word not in record.caption)
        words = region_words(record.face_caption)
        review = Review(
            caption_tokens=lengths[0],
            face_caption_tokens=lengths[1],
            text_tokens=kept,
            cut=round(max(0.0, 1 - (kept - own) / sum(lengths)) if sum(lengths) else 0.0, 6),
            fused=tuple(word_of(region) for region in fused),
            unfused=tuple((word_of(region), reason) for region, reason in unfused),
            absent=tuple(
                word
                for word in REGION_WORDS
                if word in named - {word_of(region) for region in regions}
            ),
            region_words=tuple(words.get(word, 0) for word in REGION_WORDS),
            trainable=bool(fused),
        )
        return replace(record, review=review)

    def _length(self, text: str) -> int:
        """CLIP tokens, without BOS and EOS."""
        return len(self._tokenizer.encode(text, verbose=False)) - 2


def check_trainable(store: Store, most: float) -> None:
    """Raise QualityError, with the reasons, where more than the share `most` of the samples trains
    nothing.
    """
    samples, reasons = 0, list[Counter[str]]()
    for index in read_manifests(store):
        table = read_sidecar(store, index, ["status", "trainable", "unfused"])
        rows = [row for row in table.to_pylist() if row["status"] == Status.OK]
        samples += len(rows)
        reasons += [
            Counter(found["reason"] for found in row["unfused"])
            for row in rows
            if row["trainable"] is False
        ]
    if samples and len(reasons) > most * samples:
        counts = sum(reasons, Counter[str]())
        why = ", ".join(f"{reason} of {count} regions" for reason, count in counts.most_common())
        raise QualityError(
            f"{len(reasons):,} of {samples:,} samples ({len(reasons) / samples:.0%}) would train "
            "nothing of the face: "
            f"{why or 'no region is seen'}. At most {most:.0%} may (review.max_untrainable). The "
            "shards are kept; look at their captions in the report, and change the caption backend "
            "(caption.backend), or its model or face_prompt (such as caption.llava.face_prompt): "
            "only captions are made again."
        )
