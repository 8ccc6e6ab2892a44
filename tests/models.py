"""The real detector, parser and embedder, each loaded once per process and asked once for the same
pixels.

An answer is always the model's own. Child processes and Ray's workers load their own models, so a
test that compares their bytes with this process's compares answers that were made separately.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, Final

import pytest

from configs.schema import DetectConfig, EmbedConfig, ParseConfig, WeightsConfig
from stages.backends.arcface import ArcFace
from stages.backends.bisenet import BiSeNetParser
from stages.backends.registry import BACKENDS
from stages.backends.scrfd import Scrfd
from stages.backends.weights import Weights
from stages.codec import Image, LabelMap
from stages.record import Face, FloatArray

_NAMES: Final = (("detect", "scrfd"), ("parse", "bisenet"), ("embed", "arcface"))
_REAL: Final = {job: BACKENDS[job][name] for job, name in _NAMES}
_MOST: Final = 256  # answers of one model


def remember(patch: pytest.MonkeyPatch) -> None:
    """Stages that are set up from now on share one copy of each model, and its answers."""
    for job, name in _NAMES:
        patch.setitem(BACKENDS[job], name, f"{__name__}:{job}")


def forget(patch: pytest.MonkeyPatch) -> None:
    """Stages that are set up from now on load their own models, and run them each time."""
    for job, name in _NAMES:
        patch.setitem(BACKENDS[job], name, _REAL[job])


def detect(config: DetectConfig, weights: Weights) -> Detector:
    return _detector(config, weights.config)


def parse(config: ParseConfig, weights: Weights) -> Parser:
    return _parser(config, weights.config)


def embed(config: EmbedConfig, weights: Weights) -> Embedder:
    return _embedder(config, weights.config)


@cache
def _detector(config: DetectConfig, weights: WeightsConfig) -> Detector:
    return Detector(Scrfd(config, Weights(weights)))


@cache
def _parser(config: ParseConfig, weights: WeightsConfig) -> Parser:
    return Parser(BiSeNetParser(config, Weights(weights)))


@cache
def _embedder(config: EmbedConfig, weights: WeightsConfig) -> Embedder:
    return Embedder(ArcFace(config, Weights(weights)))


class _Remembering:
    def __init__(self, model: Any) -> None:
        self._model = model
        self._answers: dict[Hashable, Any] = {}

    def _once(self, images: Sequence[Image], given: Hashable, ask: Callable[[], Any]) -> Any:
        """What `ask` answers for exactly these images, together: a batch's rounding is its own."""
        key = (*((image.shape, hashlib.sha256(image).digest()) for image in images), given)
        if key not in self._answers:
            if len(self._answers) == _MOST:
                self._answers.clear()
            self._answers[key] = ask()
        return self._answers[key]


class Detector(_Remembering):
    def detect(self, image: Image, size: int) -> list[Face]:
        return list(self._once([image], size, lambda: self._model.detect(image, size)))


class Parser(_Remembering):
    def parse(self, images: Sequence[Image]) -> list[LabelMap]:
        found = self._once(images, None, lambda: self._model.parse(images))
        return [labels.copy() for labels in found]


class Embedder(_Remembering):
    def embed(self, images: Sequence[Image], faces: Sequence[Face]) -> list[FloatArray]:
        given = tuple(faces)
        found = self._once(images, given, lambda: self._model.embed(images, faces))
        return [vector.copy() for vector in found]
