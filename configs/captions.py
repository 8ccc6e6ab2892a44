"""Settings of captions: which backend writes them, and a section for each backend.

A backend is built from its own section, and a caption signature hashes only that section.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal

from configs.common import NOT_HASHED, PlacementConfig, check, introduced, introduced_as

# The two prompts of the reference (data/FGID_caption.py).
PROMPT: Final = (
    "Please describe the people in the image, including their gender, age, clothing, facial "
    "expressions, and any other distinguishing features."
)
FACE_PROMPT: Final = (
    "Describe this person's facial features for me, including face, ears, eyes, nose, and mouth."
)
# The prompts of the second try, after an answer that is no caption.
RETRY_PROMPT: Final = (
    "Write two plain English sentences about what is visible in this photograph: hair, clothing, "
    "pose, facial expression and background. Name no one."
)
FACE_RETRY_PROMPT: Final = (
    "Write plain English sentences about what is visible of the face, ears, eyes, nose and mouth "
    "in this photograph. Name no one."
)
# The most tokens of the two captions, in those of the captioner. Training reads 77 CLIP tokens of
# both together, at most 50 of the face caption: about 60 and 40 words. These are about 70 and 115.
MAX_NEW_TOKENS: Final = 96
FACE_MAX_NEW_TOKENS: Final = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class AttributesConfig:
    """Captions composed from measurements. This backend has no settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionLanguageConfig:
    """What the backends that ask a vision-language model have in common. section: the name of the
    backend's section, for errors.
    """

    section: ClassVar[str]

    model: str = ""
    prompt: str = PROMPT
    face_prompt: str = FACE_PROMPT
    max_new_tokens: int = MAX_NEW_TOKENS  # of the caption
    face_max_new_tokens: int = field(
        default=FACE_MAX_NEW_TOKENS, metadata=introduced_as("max_new_tokens")
    )
    # mend answers, try useless ones once more with the next two prompts, and fail the record if
    # that doesn't help; false: every answer is a caption, as in version 0.1
    check_answers: bool = field(default=True, metadata=introduced(False))
    retry_prompt: str = field(default=RETRY_PROMPT, metadata=introduced(RETRY_PROMPT))
    face_retry_prompt: str = field(
        default=FACE_RETRY_PROMPT, metadata=introduced(FACE_RETRY_PROMPT)
    )
    # show a picture in a square, since a processor may cut off its ends, as LLaVA-1.5's does (the
    # backend llava pads for such processors only); false: as in version 0.1
    pad_to_square: bool = field(default=True, metadata=introduced(False))
    # the highest share of the picture's longer side that the main face's box may have in height for
    # its crop to be shown too, for the face caption; 0: never
    face_view_below: float = field(default=0.0, metadata=introduced(0.0))

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "face_max_new_tokens"):
            count = getattr(self, name)
            check(count > 0, f"caption.{self.section}.{name}={count}: expected at least 1")
        for name in ("retry_prompt", "face_retry_prompt"):
            check(
                bool(getattr(self, name).strip()),
                f"caption.{self.section}.{name} is empty: expected the prompt of the second try; "
                f"caption.{self.section}.check_answers=false tries no answer again",
            )
        check(
            0 <= self.face_view_below <= 1,
            f"caption.{self.section}.face_view_below={self.face_view_below}: expected 0 (no second "
            "view) to 1 (a second view of every face)",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LlavaConfig(VisionLanguageConfig):
    """Captions written by a vision-language model that the worker loads. model: a hub id, hub
    id@revision, or folder.
    """

    section: ClassVar[str] = "llava"

    # auto: on a GPU, float16 if the checkpoint is stored in it or the GPU has no bfloat16, else
    # bfloat16; on a CPU float32. The signature doesn't depend on which it is.
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    # 4bit: weights as NF4; needs a GPU and bitsandbytes
    quantize: Literal["none", "4bit"] = "none"
    # of models that divide a picture into tiles (LLaVA-NeXT, OneVision). all: as published; one:
    # the picture is one tile, for 2.5 times fewer image tokens at 512 × 512, and less detail
    tiles: Literal["all", "one"] = field(default="all", metadata=introduced("all"))
    device: str = field(default="auto", metadata=NOT_HASHED)
    # share of a GPU's memory up to which the batch size rises, to at most eight times
    # caption.placement.batch_size; 0: it doesn't rise
    memory_share: float = field(default=0.9, metadata=NOT_HASHED)

    def __post_init__(self) -> None:
        check(
            0 <= self.memory_share <= 1,
            f"caption.llava.memory_share={self.memory_share}: expected 0 to 1",
        )
        VisionLanguageConfig.__post_init__(self)  # super() doesn't work in a dataclass with slots


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAIConfig(VisionLanguageConfig):
    """Captions written by a server with OpenAI's chat completions interface. model: its name on the
    server.
    """

    section: ClassVar[str] = "openai"

    # For example http://HOST:8000/v1, without credentials; or several, separated by commas, which
    # share the requests. One that is given twice gets two shares.
    base_url: str = field(default="", metadata=NOT_HASHED)
    # What the server loaded the model from, such as a folder, as its /v1/models states it; "": ask.
    # The signature hashes it if it isn't `model`.
    root: str = field(default="", metadata=NOT_HASHED)
    # name of the environment variable that holds the key
    api_key_env: str = field(default="OPENAI_API_KEY", metadata=NOT_HASHED)
    # open requests at a time, over all servers, for each copy of the stage
    concurrency: int = field(default=8, metadata=NOT_HASHED)
    # attempts for each request, if the failures may be temporary
    tries: int = field(default=4, metadata=NOT_HASHED)
    # seconds for each attempt; 16 requests, with all attempts, must fit into stuck_after
    timeout: float = field(default=60.0, metadata=NOT_HASHED)

    def __post_init__(self) -> None:
        VisionLanguageConfig.__post_init__(self)  # super() doesn't work in a dataclass with slots
        check(
            1 <= self.concurrency <= 1024,
            f"caption.openai.concurrency={self.concurrency}: expected 1 to 1024",
        )
        check(self.tries >= 1, f"caption.openai.tries={self.tries}: expected at least 1")
        check(
            self.timeout > 0,
            f"caption.openai.timeout={self.timeout}: expected more than 0 seconds",
        )
        # The message doesn't show the value: it may be the key itself.
        check(
            re.fullmatch("[A-Z_][A-Z0-9_]*", self.api_key_env) is not None,
            "caption.openai.api_key_env is not the name of an environment variable, such as "
            "OPENAI_API_KEY. Put the key itself into that variable: the configuration is written "
            "to every output.",
        )
        check(
            not re.search("[@?#]", self.base_url),
            "caption.openai.base_url has more than a scheme, a host and a path. Put credentials "
            "into the environment variable that caption.openai.api_key_env names: the "
            "configuration is written to every output.",
        )
        for url in self.base_urls:
            check(
                re.fullmatch(r"https?://[^/\s]+(/\S*)?", url) is not None,
                f"caption.openai.base_url={url!r}: expected a URL such as "
                "http://127.0.0.1:8000/v1, or several, separated by commas",
            )

    @property
    def base_urls(self) -> tuple[str, ...]:
        """The URLs in `base_url`, in order."""
        if not self.base_url:
            return ()
        return tuple(url.strip().rstrip("/") for url in self.base_url.split(","))


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionConfig:
    """Which backend writes captions, and the settings of each backend."""

    backend: str = "attributes"  # also the name of its section
    attributes: AttributesConfig = field(default_factory=AttributesConfig)
    llava: LlavaConfig = field(default_factory=LlavaConfig)
    openai: OpenAIConfig = field(default_factory=OpenAIConfig)
    # the run stops if more than this share of the first 200 captions of a copy of the stage failed
    # or needed a second try; 1: it never stops
    max_useless: float = field(default=0.5, metadata=NOT_HASHED)
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NOT_HASHED)

    def __post_init__(self) -> None:
        check(
            0 <= self.max_useless <= 1,
            f"caption.max_useless={self.max_useless}: expected 0 to 1",
        )
