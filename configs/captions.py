"""Settings of captions: which backend writes them, and a section for each backend.

A backend is built from its own section, and a caption signature hashes no other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final, Literal

from configs.common import NO_ANSWER, PlacementConfig, check

# The reference's two questions (data/FGID_caption.py).
PROMPT: Final = (
    "Please describe the people in the image, including their gender, age, clothing, facial "
    "expressions, and any other distinguishing features."
)
FACE_PROMPT: Final = (
    "Describe this person's facial features for me, including face, ears, eyes, nose, and mouth."
)
MAX_NEW_TOKENS: Final = 512  # of each of the two captions


@dataclass(frozen=True, slots=True, kw_only=True)
class AttributesConfig:
    """Captions composed from what was measured have no settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlavaConfig:
    """Captions by a vision-language model that the worker loads."""

    model: str = ""  # hub id, hub id@revision, or folder
    prompt: str = PROMPT
    face_prompt: str = FACE_PROMPT
    max_new_tokens: int = MAX_NEW_TOKENS
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    # 4bit: weights as NF4; needs a GPU and bitsandbytes
    quantize: Literal["none", "4bit"] = "none"
    device: str = field(default="auto", metadata=NO_ANSWER)

    def __post_init__(self) -> None:
        _check_tokens("llava", self.max_new_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAIConfig:
    """Captions by a server that speaks OpenAI's chat completions."""

    model: str = ""  # the server's name for it
    prompt: str = PROMPT
    face_prompt: str = FACE_PROMPT
    max_new_tokens: int = MAX_NEW_TOKENS
    # as in http://HOST:8000/v1; never with credentials
    base_url: str = field(default="", metadata=NO_ANSWER)
    # name of the environment variable that holds the key
    api_key_env: str = field(default="OPENAI_API_KEY", metadata=NO_ANSWER)
    # requests open at a time, of each copy of the stage
    concurrency: int = field(default=8, metadata=NO_ANSWER)
    # attempts at a request whose failure may be temporary
    tries: int = field(default=4, metadata=NO_ANSWER)
    # seconds for each attempt; all of a request's attempts must fit into stuck_after
    timeout: float = field(default=60.0, metadata=NO_ANSWER)

    def __post_init__(self) -> None:
        _check_tokens("openai", self.max_new_tokens)
        check(
            1 <= self.concurrency <= 1024,
            f"caption.openai.concurrency={self.concurrency}: expected 1 to 1024",
        )
        check(self.tries >= 1, f"caption.openai.tries={self.tries}: expected at least 1")
        check(
            self.timeout > 0,
            f"caption.openai.timeout={self.timeout}: expected more than 0 seconds",
        )
        # The given value isn't repeated: it may be the key itself.
        check(
            re.fullmatch("[A-Z_][A-Z0-9_]*", self.api_key_env) is not None,
            "caption.openai.api_key_env is not the name of an environment variable, as in "
            "OPENAI_API_KEY. The key itself belongs into that variable: configurations are kept "
            "beside every output.",
        )
        check(
            not re.search("[@?#]", self.base_url),
            "caption.openai.base_url holds more than a scheme, a host and a path. Credentials "
            "belong into the environment variable that caption.openai.api_key_env names: "
            "configurations are kept beside every output.",
        )
        check(
            re.fullmatch(r"(https?://[^/\s]+(/\S*)?)?", self.base_url) is not None,
            f"caption.openai.base_url={self.base_url!r}: expected a URL as in "
            "http://127.0.0.1:8000/v1",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionConfig:
    backend: str = "attributes"  # the backend, and the name of its section
    attributes: AttributesConfig = field(default_factory=AttributesConfig)
    llava: LlavaConfig = field(default_factory=LlavaConfig)
    openai: OpenAIConfig = field(default_factory=OpenAIConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NO_ANSWER)


def _check_tokens(section: str, count: int) -> None:
    check(count > 0, f"caption.{section}.max_new_tokens={count}: expected at least 1")
