"""What is sent: pictures, prompts, and how long an answer may be."""

from __future__ import annotations

from functools import cache
from typing import Final, NamedTuple

import numpy as np

from configs.captions import OpenAIConfig
from stages.backends.protocols import Kind
from stages.codec import encode_jpeg

KINDS: Final[tuple[Kind, Kind]] = (0, 1)


class Question(NamedTuple):
    """An encoded JPEG, a prompt, and the most tokens that the answer may have."""

    jpeg: bytes
    prompt: str
    tokens: int


def question(config: OpenAIConfig, jpeg: bytes, kind: Kind, *, second: bool = False) -> Question:
    """Returns the question for a caption of that kind. second: for the second try."""
    first = (config.prompt, config.face_prompt)
    prompts = (config.retry_prompt, config.face_retry_prompt) if second else first
    return Question(jpeg, prompts[kind], config.max_new_tokens)


def largest_questions(config: OpenAIConfig, longest_side: int) -> list[Question]:
    """Returns all questions that a run may ask, with a plain picture of the largest size."""
    seconds = (False, True) if config.check_answers else (False,)
    jpeg = plain_picture(longest_side)
    return [question(config, jpeg, kind, second=second) for second in seconds for kind in KINDS]


def side_sent(longest_side: int) -> int:
    """Returns the side of the largest picture that is sent, a square, in pixels. longest_side: of
    the run's images.
    """
    return longest_side


@cache
def plain_picture(longest_side: int) -> bytes:
    """Returns a grey JPEG of the largest size that is sent."""
    side = side_sent(longest_side)
    return encode_jpeg(np.full((side, side, 3), 127, np.uint8), 95)
