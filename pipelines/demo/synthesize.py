"""Generates portraits of people who don't exist, for the demo, from a seed.

Four fifths of FGID are synthetic StyleGAN faces (SFHQ). This generates the same kind with
MobileStyleGAN (FFHQ, 1024 × 1024) on OpenVINO. Styles are truncated towards their mean,
`w = mean + t·(map(z) - mean)` with t < 1: less variety, more realism.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stages.backends.weights import Weights
from stages.codec import Image, encode_jpeg

Style = np.ndarray[Any, np.dtype[np.float32]]

STYLE_DIM = 512
TRUNCATION = 0.6  # of single portraits
MEAN_SAMPLES = 512  # styles averaged for the mean


class Synthesizer:
    """Loads MobileStyleGAN's two networks. A portrait depends on its style only.

    A style is (1, 512) float32.
    """

    def __init__(self, weights: Weights | None = None) -> None:
        weights = weights or Weights()
        self._mapping = _network(weights, "stylegan_mapping")
        self._synthesis = _network(weights, "stylegan_synthesis")
        self._mean = np.mean(
            [_run(self._mapping, _noise(0, i)) for i in range(MEAN_SAMPLES)], axis=0
        )

    def portrait(self, seed: int, index: int) -> Image:
        """Returns a portrait, RGB (1024, 1024, 3) uint8, which depends on (seed, index) only."""
        return self.render(self.style(seed, index, TRUNCATION))

    def style(self, seed: int, index: int, truncation: float) -> Style:
        """Returns a random style. truncation: factor of its distance from the mean style; 1 leaves
        it as it is.
        """
        style = _run(self._mapping, _noise(seed + 1, index))
        truncated: Style = self._mean + truncation * (style - self._mean)
        return truncated

    def render(self, style: Style) -> Image:
        """Returns the picture of a style, RGB (1024, 1024, 3) uint8."""
        pixels = _run(self._synthesis, style)[0]
        rgb = np.clip(pixels * 127.5 + 127.5, 0, 255).transpose(1, 2, 0)
        return np.ascontiguousarray(rgb.round().astype(np.uint8))


def write_portraits(
    folder: Path, count: int, seed: int, weights: Weights | None = None
) -> Iterator[Path]:
    """Write `count` files portrait-SEED-NNNNN.jpg into `folder`; yields each path once it exists.

    Files that exist already are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    synthesizer: Synthesizer | None = None
    for index in range(count):
        path = folder / f"portrait-{seed}-{index:05d}.jpg"
        if not path.exists():
            synthesizer = synthesizer or Synthesizer(weights)
            partial = path.with_suffix(".part")
            partial.write_bytes(encode_jpeg(synthesizer.portrait(seed, index), 92))
            partial.replace(path)
        yield path


def write_extras(folder: Path, seed: int, weights: Weights | None = None) -> None:
    """Write into the portraits' folder: a real photograph (scikit-image's astronaut: NASA, public
    domain) and `_poisoned/`, the files of `write_poisoned`, of other people than the portraits'.
    """
    import skimage.data

    from pipelines.demo.poison import POISONED_FACES, write_poisoned

    if not (folder / "_poisoned").exists():
        (folder / "astronaut.jpg").write_bytes(encode_jpeg(skimage.data.astronaut(), 95))
        with tempfile.TemporaryDirectory() as others:
            faces = [*write_portraits(Path(others), POISONED_FACES, seed + 1, weights)]
            write_poisoned(folder / "_poisoned", faces)


def _noise(seed: int, index: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    generator = np.random.Generator(np.random.PCG64([seed, index]))
    return generator.standard_normal((1, STYLE_DIM), dtype=np.float32)


def _network(weights: Weights, name: str) -> Any:
    import openvino

    core = openvino.Core()
    model = core.read_model(weights.fetch(f"{name}_xml"), weights.fetch(f"{name}_bin"))
    return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def _run(network: Any, value: Any) -> Any:
    return network(value)[network.output(0)]
