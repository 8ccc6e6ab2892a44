"""Review: makes the training text of each sample's captions, and records what it contains.

If a caption names no region, or is so long that all clauses about the face are cut, the trainer
fuses no region, without an error. This stage records metrics of that, and a run fails if too many
samples are not trainable.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING, Any

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
from stages.annotations import ABSENT, FUSED, Review
from stages.backends.weights import Weights
from stages.base import RecordStage
from stages.caption import CaptionStage
from stages.codec import decode_labels
from stages.record import Record, Status
from stages.regions import REGION_WORDS, Mode, region_masks, word_of

if TYPE_CHECKING:
    from pipelines.report.stats import Report

_VOCABULARY = "clip_bpe"
_ADDED_WORDS = ("Detail:", "Caption:")  # the trainer adds them; two tokens each


class ReviewStage(RecordStage):
    name = "review"
    version = 1
    requires = ("parsing", "caption", "face_caption")
    provides = (Review.name,)
    annotation = Review
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
        captions = (record.caption, record.face_caption)
        spec = spec_named(self.config.spec)
        text = training_text(*captions, regions, self._tokenizer, spec, mode)
        tokens, fused, unfused = fused_regions(text, self._tokenizer, mode)
        lengths = [self._length(caption) for caption in captions]
        used = min(self._length(without_marks(text.text)), len(tokens.ids) - 2)
        added = sum(2 for w in _ADDED_WORDS if w in text.text and w not in record.caption)
        share = 1 - (used - added) / sum(lengths) if sum(lengths) else 0.0
        shown = {word_of(region) for region in regions}
        named = {word for caption in captions for word in named_regions(caption)}
        statuses = dict.fromkeys(named - shown, ABSENT)
        statuses |= {word_of(region): reason for region, reason in unfused}
        statuses |= {word_of(region): FUSED for region in fused}
        words = region_words(record.face_caption)
        return record.annotated(
            Review(
                caption_tokens=lengths[0],
                face_caption_tokens=lengths[1],
                text_tokens=used,
                cut=round(max(0.0, share), 6),
                trainable=bool(fused),
                regions=tuple(statuses.get(word, "") for word in REGION_WORDS),
                region_words=tuple(words.get(word, 0) for word in REGION_WORDS),
            )
        )

    def _length(self, text: str) -> int:
        """Returns the number of CLIP tokens, without BOS and EOS."""
        return len(self._tokenizer.encode(text, verbose=False)) - 2


def check_trainable(report: Report, limit: float) -> None:
    """Raises QualityError, with the reasons, if more than the share `limit` (0 to 1) of all records
    that reached the captioner is not trainable: it failed to caption them, or no region is fused.
    """
    unfused = report.tally["trainable", "no"]
    trained = report.tally["trainable", "yes"] + report.tally["trainable", "unknown"]
    failed = Counter(
        {
            entry["reason"]: entry["count"]
            for entry in report.stats["data"]["reasons"]
            if (entry["status"], entry["stage"]) == (Status.FAILED, CaptionStage.name)
        }
    )
    untrainable = unfused + failed.total()
    records = untrainable + trained
    if untrainable <= limit * records:
        return
    regions = Counter(
        {key[1]: n for key, n in report.tally.items() if key[0] == "untrainable_because"}
    )
    reasons = [f"{reason} of {count} records" for reason, count in failed.most_common()]
    reasons += [f"{reason} of {count} regions" for reason, count in regions.most_common()]
    raise QualityError(
        f"{untrainable:,} of {records:,} records ({untrainable / records:.0%}) are not trainable, "
        f"since they have no caption, or no region is fused: "
        f"{', '.join(reasons) or 'no region is visible'}. At most {limit:.0%} may be "
        "(review.max_untrainable). The shards are kept. Look at the captions in the report, and "
        "change the prompts or the model of the caption backend: the next run makes captions only."
    )
