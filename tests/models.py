"""The real detector, parser and embedder, each loaded once in a process, with a cache of results.

Results always come from the model. Child processes and Ray workers load their own models, so a test
that compares their bytes with those of this process compares results that were computed separately.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, Final

import pytest

from configs.common import WeightsConfig
from configs.schema import DetectConfig, EmbedConfig, ParseConfig
from stages.backends.registry import BACKENDS
from stages.backends.weights import Weights
from stages.codec import Image, LabelMap
from stages.record import Face, FloatArray

_NAMES: Final = (("detect", "scrfd"), ("parse", "bisenet"), ("embed", "arcface"))
_REAL: Final = {job: BACKENDS[job][name] for job, name in _NAMES}
_MOST: Final = 256  # cached results of one model


def remember(patch: pytest.MonkeyPatch) -> None:
    """Lets stages that are set up from now on share one copy of each model, and cached results."""
    for job, name in _NAMES:
        patch.setitem(BACKENDS[job], name, f"{__name__}:{job}")


def forget(patch: pytest.MonkeyPatch) -> None:
    """Lets stages that are set up from now on load their own models and not cache results."""
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
    from stages.backends.scrfd import Scrfd

    return Detector(Scrfd(config, Weights(weights)))


@cache
def _parser(config: ParseConfig, weights: WeightsConfig) -> Parser:
    from stages.backends.bisenet import BiSeNetParser

    return Parser(BiSeNetParser(config, Weights(weights)))


@cache
def _embedder(config: EmbedConfig, weights: WeightsConfig) -> Embedder:
    from stages.backends.arcface import ArcFace

    return Embedder(ArcFace(config, Weights(weights)))


class _Cached:
    def __init__(self, model: Any) -> None:
        self._model = model
        self._results: dict[Hashable, Any] = {}

    def _cached(self, images: Sequence[Image], options: Hashable, run: Callable[[], Any]) -> Any:
        """Returns `run()`, cached for these images as one batch, since rounding depends on the
        batch.
        """
        key = (*((image.shape, hashlib.sha256(image).digest()) for image in images), options)
        if key not in self._results:
            if len(self._results) == _MOST:
                self._results.clear()
            self._results[key] = run()
        return self._results[key]


class Detector(_Cached):
    def detect(self, image: Image, size: int) -> list[Face]:
        return list(self._cached([image], size, lambda: self._model.detect(image, size)))


class Parser(_Cached):
    def parse(self, images: Sequence[Image]) -> list[LabelMap]:
        results = self._cached(images, None, lambda: self._model.parse(images))
        return [labels.copy() for labels in results]


class Embedder(_Cached):
    def embed(self, images: Sequence[Image], faces: Sequence[Face]) -> list[FloatArray]:
        vectors = self._cached(images, tuple(faces), lambda: self._model.embed(images, faces))
        return [vector.copy() for vector in vectors]

    def embed_crops(self, crops: Sequence[Image]) -> list[FloatArray]:
        vectors = self._cached(crops, None, lambda: self._model.embed_crops(crops))
        return [vector.copy() for vector in vectors]
