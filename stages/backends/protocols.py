"""The interfaces of backends. Images are RGB uint8 (H, W, 3), coordinates are in their pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

from stages.codec import Image, LabelMap
from stages.record import Face, FloatArray, Record

if TYPE_CHECKING:
    from stages.base import Failed

# stop: the captioner ended its answer; length: the limit of tokens ended it; "": unknown
Finish = Literal["stop", "length", ""]


class Answer(NamedTuple):
    """A captioner's answer to one prompt, and why it ends."""

    text: str
    finish: Finish


# of the two captions: 0, of the whole image; 1, of the face
Kind = Literal[0, 1]


class FaceDetector(Protocol):
    def detect(self, image: Image, size: int) -> list[Face]:
        """Returns all faces of the image, highest score first, in pixels of `image`.

        size: side of the detector's square input, pixels.
        """
        ...


class FaceParser(Protocol):
    def parse(self, images: Sequence[Image]) -> list[LabelMap]:
        """Returns label maps (H, W) of CelebAMask-HQ classes 0-18, of the images' sizes."""
        ...


class IdentityEmbedder(Protocol):
    def embed(self, images: Sequence[Image], faces: Sequence[Face]) -> list[FloatArray]:
        """Returns float32[512] for the face in each image, as the network outputs it, not
        normalised.
        """
        ...

    def embed_crops(self, crops: Sequence[Image]) -> list[FloatArray]:
        """Returns the same for aligned faces, BGR (112, 112, 3)."""
        ...


class Captioner(Protocol):
    """Writes captions. `config` is the backend's section of CaptionConfig.

    A captioner may have an attribute `counts: Counter[str]`, for example of tokens. The manifest of
    a shard states what was counted for the shard. If `config.check_answers` exists and is true, the
    captioner also is a Prompted one.

    It may have two more methods, which take the sides of the run's largest image in pixels:
    `prepare(largest, is_useless)`, called before `caption`, with the test for answers that
    need a second try (None: no answer does); and the static `preflight(config, largest)`,
    called before a run, which raises PipelineError if the captioner can't work.

    independent: whether the captions of a record can't depend on the others of its call.
    """

    independent: ClassVar[bool]

    def caption(
        self, records: Sequence[Record], batch_size: int
    ) -> Sequence[tuple[Answer, Answer] | Failed]:
        """Returns for each record the answers that become caption and face caption, or Failed with
        the reason.

        batch_size: the most images that go through a model together. Raises PipelineError for a
        fault that isn't a record's.
        """
        ...

    @staticmethod
    def digests(config: Any) -> Mapping[str, str]:
        """Returns name → digest of all that results depend on besides `config`, without loading a
        model.
        """
        ...

    @staticmethod
    def window(config: Any, batch_size: int) -> int:
        """Returns the most records that one call of `caption` takes."""
        ...


class Prompted(Protocol):
    """What a captioner has that answers prompts, such as a vision-language model."""

    def retry(
        self, records: Sequence[Record], kinds: Sequence[Kind], batch_size: int
    ) -> Sequence[Answer | Failed]:
        """Returns the answer to the prompt of the second try, `config.retry_prompt` or
        `config.face_retry_prompt`, for each record and the caption of `kinds`; or Failed. A record
        may be there twice. The rest is as in `Captioner.caption`.
        """
        ...
