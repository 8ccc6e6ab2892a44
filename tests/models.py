"""Caches of the detector, the parser and the embedder, to make tests faster.

Each model is loaded once in a process, and its outputs for the same images are cached. Child
processes and Ray's workers load and run their own models, so a test that compares their bytes with
this process's compares outputs that were computed separately.
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
_CACHE_SIZE: Final = 256  # outputs of one model


def remember(patch: pytest.MonkeyPatch) -> None:
    """Lets stages that are set up from now on share the models and the caches of this module."""
    for job, name in _NAMES:
        patch.setitem(BACKENDS[job], name, f"{__name__}:{job}")


def forget(patch: pytest.MonkeyPatch) -> None:
    """Lets stages that are set up from now on load their own models, without a cache."""
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


class _CachingModel:
    def __init__(self, model: Any) -> None:
        self._model = model
        self._outputs: dict[Hashable, Any] = {}

    def _cached(
        self, images: Sequence[Image], arguments: Hashable, compute: Callable[[], Any]
    ) -> Any:
        """Returns the cached output for a batch with these arguments, or computes it.

        The key is the whole batch, because rounding depends on the batch.
        """
        key = (*((image.shape, hashlib.sha256(image).digest()) for image in images), arguments)
        if key not in self._outputs:
            if len(self._outputs) == _CACHE_SIZE:
                self._outputs.clear()
            self._outputs[key] = compute()
        return self._outputs[key]


class Detector(_CachingModel):
    def detect(self, image: Image, size: int) -> list[Face]:
        return list(self._cached([image], size, lambda: self._model.detect(image, size)))


class Parser(_CachingModel):
    def parse(self, images: Sequence[Image]) -> list[LabelMap]:
        label_maps = self._cached(images, None, lambda: self._model.parse(images))
        return [labels.copy() for labels in label_maps]


class Embedder(_CachingModel):
    def embed(self, images: Sequence[Image], faces: Sequence[Face]) -> list[FloatArray]:
        vectors = self._cached(images, tuple(faces), lambda: self._model.embed(images, faces))
        return [vector.copy() for vector in vectors]
