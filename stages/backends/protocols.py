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
        """All faces at detector input size `size`², best score first, coordinates of `image`."""
        ...


class FaceParser(Protocol):
    def parse(self, images: Sequence[Image]) -> list[LabelMap]:
        """CelebAMask-HQ labels 0-18, each map (h, w) of its image's own size."""
        ...


class IdentityEmbedder(Protocol):
    def embed(self, images: Sequence[Image], faces: Sequence[Face]) -> list[FloatArray]:
        """float32[512] per image, of the face given for it, as the network gives it: not yet of
        unit norm.
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
