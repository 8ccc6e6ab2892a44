"""What is sent: pictures, prompts, and how long an answer may be."""

from __future__ import annotations

from functools import cache
from typing import Final, NamedTuple

import numpy as np

from configs.captions import OpenAIConfig
from stages.backends.protocols import Kind
from stages.backends.views import CROP_SIDE
from stages.codec import encode_jpeg

KINDS: Final[tuple[Kind, Kind]] = (0, 1)


class Question(NamedTuple):
    """Encoded JPEGs, a prompt, and the most tokens that the answer may have."""

    jpegs: tuple[bytes, ...]
    prompt: str
    tokens: int


def question(
    config: OpenAIConfig, jpegs: tuple[bytes, ...], kind: Kind, *, second: bool = False
) -> Question:
    """Returns the question for a caption of that kind. second: for the second try."""
    first = (config.prompt, config.face_prompt)
    prompts = (config.retry_prompt, config.face_retry_prompt) if second else first
    most = (config.max_new_tokens, config.face_max_new_tokens)
    return Question(jpegs, prompts[kind], most[kind])


def largest_questions(config: OpenAIConfig, largest: tuple[int, int]) -> list[Question]:
    """Returns all questions that a run may ask, with plain pictures of the largest size."""
    seconds = (False, True) if config.check_answers else (False,)
    return [
        question(config, plain_pictures(config, largest, kind), kind, second=second)
        for second in seconds
        for kind in KINDS
    ]


def size_sent(config: OpenAIConfig, largest: tuple[int, int]) -> tuple[int, int]:
    """Returns width and height of the largest picture that is sent, pixels. largest: short and long
    side of the run's images.
    """
    short, long = largest
    return (long if config.pad_to_square else short), long


def plain_pictures(config: OpenAIConfig, largest: tuple[int, int], kind: Kind) -> tuple[bytes, ...]:
    """Returns grey JPEGs as they are sent for a caption of that kind: of the largest picture, and
    of the crop of a small face if there may be one.
    """
    picture = _grey(*size_sent(config, largest))
    has_crop = kind == 1 and config.face_view_below > 0
    return (picture, _grey(CROP_SIDE, CROP_SIDE)) if has_crop else (picture,)


@cache
def _grey(width: int, height: int) -> bytes:
    return encode_jpeg(np.full((height, width, 3), 127, np.uint8), 95)
