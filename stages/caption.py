"""Caption: writes a caption of each image and one of its main face, with `config.backend`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from configs.captions import FACE_PROMPT, MAX_NEW_TOKENS, PROMPT, CaptionConfig
from configs.common import hashed_settings
from stages.backends.registry import backend_class
from stages.base import BackendStage, Failed, reject
from stages.codec import decode_jpeg, decode_labels
from stages.record import Record

# Version 0.1 hashed one set of settings for all backends. A setting that the chosen backend doesn't
# have is still hashed, with its default of version 0.1. If one of these constants is changed, its
# present value must be written here instead.
_HASHED_IN_0_1: Final = {
    "model": "",
    "prompt": PROMPT,
    "face_prompt": FACE_PROMPT,
    "max_new_tokens": MAX_NEW_TOKENS,
    "dtype": "float32",
    "quantize": "none",
}


class CaptionStage(BackendStage):
    """Captions the records of a batch together; a record that can't be captioned fails alone.

    Reasons of failure: `bad_input` (image, label map and main face don't fit together),
    `empty_caption`, `caption_failed` (the model server gave no usable response for this image).
    """

    name = "caption"
    version = 1
    requires = ("image", "faces", "face", "parsing")
    provides = ("caption", "face_caption")
    config: CaptionConfig

    def hashed_settings(self) -> dict[str, Any]:
        settings = hashed_settings(self.backend_config)
        return {**_HASHED_IN_0_1, "backend": self.config.backend, **settings}

    def digests(self) -> Mapping[str, str]:
        digests: Mapping[str, str] = self._captioner.digests(self.backend_config)
        return digests

    @property
    def batch_size(self) -> int:
        window: int = self._captioner.window(self.backend_config, self.resources.batch_size)
        return window

    @property
    def backend_config(self) -> Any:
        """The section of the chosen backend. Raises ConfigError for an unknown backend."""
        backend_class(self.name, self.config.backend)
        return getattr(self.config, self.config.backend)

    @property
    def _captioner(self) -> Any:
        return backend_class(self.name, self.config.backend)

    def process(self, records: list[Record]) -> list[Record]:
        valid: list[Record] = []
        results: dict[str, Record] = {}
        for record in records:
            try:
                check(record)
                valid.append(record)
            except Failed as rejection:
                results[record.key] = reject(record, rejection, self.name)
        captions: Sequence[tuple[str, str] | Failed] = (
            self.backend.caption(valid, self.resources.batch_size) if valid else []
        )
        for record, pair in zip(valid, captions, strict=True):
            if isinstance(pair, Failed):
                results[record.key] = reject(record, pair, self.name)
            else:
                results[record.key] = self._captioned(record, *pair)
        return [results[record.key] for record in records]

    def _captioned(self, record: Record, caption: str, face_caption: str) -> Record:
        for kind, text in (("coarse", caption), ("fine", face_caption)):
            if not text.strip():
                return reject(
                    record, Failed("empty_caption", f"the {kind} description is empty"), self.name
                )
        return replace(record, caption=caption, face_caption=face_caption)


def check(record: Record) -> None:
    """Raises Failed unless the image decodes, the label map has the image's size, and the main face
    has five landmarks.
    """
    if not record.image or not record.parsing:
        raise Failed("bad_input", f"no {'label map' if record.image else 'image'}")
    try:
        size = decode_jpeg(record.image).shape[:2]
        labels = decode_labels(record.parsing).shape
        landmarks = len(record.main_face.landmarks)
    except ValueError as error:
        raise Failed("bad_input", str(error)) from error
    if size != labels:
        raise Failed("bad_input", f"image {size[1]}×{size[0]}, label map {labels[1]}×{labels[0]}")
    if landmarks != 5:
        raise Failed("bad_input", f"{landmarks} landmarks, expected 5")
