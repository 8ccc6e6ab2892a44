"""What a stage asks of a model. Images are RGB uint8 (H, W, 3), coordinates are in their pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from stages.codec import Image, LabelMap
from stages.record import Face, FloatArray, Record

if TYPE_CHECKING:
    from stages.base import Failed


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


class Captioner(Protocol):
    """May carry `counts: Counter[str]`, such as tokens: each shard's manifest says what was counted
    for it. `config` is the backend's own section of CaptionConfig.
    """

    def caption(
        self, records: Sequence[Record], batch_size: int
    ) -> Sequence[tuple[str, str] | Failed]:
        """(coarse, fine) description of each record, from its image and what was measured of it; or
        why there is none. At most `batch_size` images go through a model together.

        Raises PipelineError for what is no record's fault.
        """
        ...

    @staticmethod
    def digests(config: Any) -> Mapping[str, str]:
        """name → digest of whatever the answers depend on beside `config`. Loads nothing."""
        ...

    @staticmethod
    def window(config: Any, batch_size: int) -> int:
        """The most records that one call should be given."""
        ...
