"""Annotations of the measure, caption, claims and review stages.

A new stage defines its annotation in its own file; see CONTRIBUTING.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

from stages.fields import Annotation, Metric, stored
from stages.regions import MAX_REGIONS, REGION_WORDS

FUSED = "fused"
ABSENT = "absent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures(Annotation):
    """Metrics for the quality filter, of the main face, and the perceptual hash of the whole image.
    stages/measurements.py describes how each is measured.
    """

    name: ClassVar[str] = "measures"

    sharpness: float = stored(
        "sharpness of the main face, normalised for its size, 0 (blurred) to 1",
        pa.float64(),
        metric=Metric(title="Sharpness", note="of the main face"),
    )
    brightness: float = stored(
        "mean luma of the face's skin, 0 to 1",
        pa.float64(),
        metric=Metric(title="Brightness", note="of the face's skin, 0 to 1"),
    )
    clipped: float = stored(
        "share of the face's pixels that are black or white (luma 0-2 or 253-255), 0 to 1",
        pa.float64(),
        metric=Metric(title="Clipped", unit="%", note="of the face, black or white", scale=100),
    )
    yaw: float = stored(
        "degrees; 0 is frontal, over 0: turned to the viewer's right",
        pa.float64(),
        metric=Metric(title="Yaw", unit="°", note="over 0: to the viewer's right", group="pose"),
    )
    pitch: float = stored(
        "degrees; 0 is frontal, over 0: raised",
        pa.float64(),
        metric=Metric(title="Pitch", unit="°", note="over 0: raised", group="pose"),
    )
    roll: float = stored(
        "degrees; 0 is upright, over 0: tilted clockwise as the viewer sees it",
        pa.float64(),
        metric=Metric(title="Roll", unit="°", note="over 0: clockwise", group="pose"),
    )
    occlusion: float = stored(
        "share of the face's expected area that something else covers, 0 to 1",
        pa.float64(),
        metric=Metric(title="Occlusion", unit="%", note="of the face, covered", scale=100),
    )
    hash: str = stored("perceptual hash of the image: 256-bit DCT hash, 64 hex digits", pa.string())


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers(Annotation):
    """What was checked of the answers that became caption and face caption; see stages/answers. Of
    each pair, the first is the caption's.
    """

    name: ClassVar[str] = "answers"

    answer_finish: tuple[str, ...] = stored(
        "why the answers of caption and face caption end: stop, length (of the tokens), or empty "
        "(unknown)",
        pa.list_(pa.string()),
        length=2,
    )
    answer_verdicts: tuple[str, ...] = stored(
        "what was removed from each answer: thinking, markdown, preamble, cut (the end that the "
        "limit of tokens cut off), separated by spaces",
        pa.list_(pa.string()),
        length=2,
    )
    answer_mended: tuple[bool, ...] = stored(
        "for each answer, whether the caption differs from it", pa.list_(pa.bool_()), length=2
    )
    first_verdicts: tuple[str, ...] = stored(
        "for each answer to the prompt of the second try, the verdicts on the first; else empty",
        pa.list_(pa.string()),
        length=2,
    )
    mended_answers: int = stored(
        "number of the two captions that differ from the model's answer",
        pa.int32(),
        metric=Metric(title="Mended answers", note="of the two", whole=True, group="text"),
    )
    second_tries: int = stored(
        "number of the two captions that are answers to the prompt of the second try",
        pa.int32(),
        metric=Metric(title="Second tries", note="of the two", whole=True, group="text"),
    )
    face_height: float = stored(
        "height of the main face's box as a share of the image's longer side, 0 to 1",
        pa.float64(),
        metric=Metric(
            title="Face height",
            unit="%",
            note="of the image's longer side",
            scale=100,
            group="text",
        ),
    )
    face_view: bool = stored(
        "true if the model got the face's crop as a second image for the face caption", pa.bool_()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims(Annotation):
    """What the captions claim, and which of it is contradicted; see stages/claims."""

    name: ClassVar[str] = "claims"

    checked_claims: int = stored(
        "number of claims of both captions on glasses, hat, hair, mouth, ears and pose",
        pa.int32(),
        metric=Metric(title="Checked claims", note="of the captions", whole=True, group="text"),
    )
    contradictions: int = stored(
        "number of these claims that label map or measures contradict",
        pa.int32(),
        metric=Metric(title="Contradictions", note="of the claims", whole=True, group="text"),
    )
    contradicted: str = stored(
        "the contradicted claims: topic, claimed value and words of each, separated by semicolons",
        pa.string(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Review(Annotation):
    """The result of making a training text of a sample's captions; see pipelines/review.py."""

    name: ClassVar[str] = "review"

    caption_tokens: int = stored(
        "CLIP tokens of the caption, not cut, without begin and end tokens",
        pa.int32(),
        metric=Metric(
            title="Caption", unit="tokens", note="coarse description", whole=True, group="text"
        ),
    )
    face_caption_tokens: int = stored(
        "CLIP tokens of the face caption, not cut, without begin and end tokens",
        pa.int32(),
        metric=Metric(
            title="Face caption", unit="tokens", note="fine description", whole=True, group="text"
        ),
    )
    text_tokens: int = stored(
        "CLIP tokens of the training text that the trainer makes of both captions",
        pa.int32(),
        metric=Metric(
            title="Training text",
            unit="tokens",
            note="as the trainer makes it",
            whole=True,
            group="text",
        ),
    )
    cut: float = stored(
        "share of both captions' tokens that the training text leaves out, 0 to 1",
        pa.float64(),
        metric=Metric(
            title="Share cut",
            unit="%",
            note="of the captions, in training",
            scale=100,
            group="text",
        ),
    )
    trainable: bool = stored(
        "true if training fuses at least one region's image into its word", pa.bool_()
    )
    regions: tuple[str, ...] = stored(
        "for each of face, ears, eyes, nose and mouth: fused (training fuses its image into its "
        "word), the reason why not, absent (a caption names it and the label map doesn't show it), "
        "or empty (neither named nor shown)",
        pa.list_(pa.string()),
        length=MAX_REGIONS,
    )
    region_words: tuple[int, ...] = stored(
        "for each of the five regions: words of the clause that names it; 0: none",
        pa.list_(pa.int32()),
        length=MAX_REGIONS,
    )

    @property
    def fused(self) -> tuple[str, ...]:
        """Regions whose images training fuses into their words."""
        return fused_words(self.regions)

    @property
    def unfused(self) -> tuple[tuple[str, str], ...]:
        """(region, reason) of each region that is shown and not fused."""
        return unfused_words(self.regions)

    @property
    def absent(self) -> tuple[str, ...]:
        """Regions that a caption names and the label map doesn't show."""
        return absent_words(self.regions)


def fused_words(statuses: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """Returns the regions whose status is `fused`. statuses: as in Review.regions; may be empty."""
    return tuple(w for w, status in zip(REGION_WORDS, statuses, strict=False) if status == FUSED)


def absent_words(statuses: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """Returns the regions whose status is `absent`."""
    return tuple(w for w, status in zip(REGION_WORDS, statuses, strict=False) if status == ABSENT)


def unfused_words(statuses: tuple[str, ...] | list[str]) -> tuple[tuple[str, str], ...]:
    """Returns (region, reason) for each region that is shown and not fused."""
    pairs = zip(REGION_WORDS, statuses, strict=False)
    return tuple((word, status) for word, status in pairs if status not in (FUSED, ABSENT, ""))
