"""Directions in the generator's space of styles that change pose, expression, light, glasses or
hair, and the person as little as possible.

They are in directions.safetensors. `python -m pipelines.demo.directions` fits them again, in eight
minutes on two cores: it measures random portraits, and explains each measure and the identity
embedding linearly by the style.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from configs.schema import DetectConfig, EmbedConfig, ParseConfig
from pipelines.demo.synthesize import STYLE_DIM, Synthesizer
from stages.backends.appearance import measure_appearance
from stages.backends.arcface import ArcFace, crop
from stages.backends.bisenet import BiSeNetParser
from stages.backends.colors import to_lab
from stages.backends.scrfd import Scrfd
from stages.backends.weights import Weights
from stages.codec import Image
from stages.detect import find_faces
from stages.measurements import measure
from stages.record import Face
from stages.regions import LABEL_IDS

Array = npt.NDArray[np.float64]

# A step along one direction leaves the other measures unchanged. Its unit is the measure's standard
# deviation among the portraits. hair: median L (CIE Lab) of the hair's pixels.
MEASURES: Final = ("yaw", "pitch", "smile", "brightness", "glasses", "hair")
_FILE: Final = Path(__file__).with_name("directions.safetensors")
_SEED: Final = 77
_PORTRAITS: Final = 900
_TRUNCATION: Final = 0.9
_SIDE: Final = 256  # pixels, of the pictures that are measured
_MIN_HAIR: Final = 300  # pixels; portraits with less hair are left out
_IDENTITY: Final = 40  # principal components of the identity embedding that stay unchanged
# ridge penalties; chosen by the correlation with portraits that were left out of the fit
_RIDGE: Final = 10.0
_IDENTITY_RIDGE: Final = 30.0

DETECT: Final = DetectConfig(weights="scrfd_500m_bnkps")
EMBED: Final = EmbedConfig(weights="w600k_mbf")


def load_directions() -> dict[str, npt.NDArray[np.float32]]:
    """Returns for each of MEASURES the step of a style, (512,) float32, that raises the measure by
    one standard deviation. Larger is: turned to the viewer's right, raised, smiling, brighter, with
    glasses, with lighter hair.
    """
    directions: dict[str, npt.NDArray[np.float32]] = load_file(_FILE)
    return directions


def largest_face(detector: Scrfd, image: Image) -> Face | None:
    """Returns the largest face of an RGB image; None if there is none."""
    faces = find_faces(detector, image, DETECT)
    return max(faces, key=lambda face: face.area) if faces else None


def reduced(image: Image, side: int) -> Image:
    """Returns a square picture reduced to side × side pixels."""
    return np.asarray(cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA), np.uint8)


def fit(
    weights: Weights, track: Callable[[range], Iterable[int]]
) -> dict[str, npt.NDArray[np.float32]]:
    """Measures portraits, and fits the directions. track: shows the progress of a loop."""
    synthesizer, detector = Synthesizer(weights), Scrfd(DETECT, weights)
    parser = BiSeNetParser(ParseConfig(dtype="bfloat16"), weights)
    embedder = ArcFace(EMBED, weights)
    styles, measures, identities = [], [], []
    for index in track(range(_PORTRAITS)):
        style = synthesizer.style(_SEED, index, _TRUNCATION)
        image = reduced(synthesizer.render(style), _SIDE)
        face = largest_face(detector, image)
        if face is None:
            continue
        labels = parser.parse([image])[0]
        hair = labels == LABEL_IDS["hair"]
        if hair.sum() <= _MIN_HAIR:
            continue
        values: dict[str, Any] = {
            name: getattr(source, name)
            for source, names in (
                (measure(image, labels, face), ("yaw", "pitch", "brightness")),
                (measure_appearance(image, labels, face), ("smile", "glasses")),
            )
            for name in names
        }
        values["hair"] = np.median(to_lab(image)[hair][:, 0])
        styles.append(style[0])
        measures.append([float(values[name]) for name in MEASURES])
        identities.append(embedder.embed_crops([crop(image, face)])[0])
    return _solve(
        np.array(styles, np.float64),
        np.array(measures, np.float64),
        np.array(identities, np.float64),
    )


def _solve(styles: Array, measures: Array, identities: Array) -> dict[str, npt.NDArray[np.float32]]:
    """Returns the steps of the smallest Mahalanobis length, measured by the styles' covariance,
    that change one measure and neither the others nor the identity, as far as both are linear.

    styles: (N, 512). measures: (N, M), of MEASURES. identities: (N, 512), embeddings.
    """
    centred = styles - styles.mean(0)
    square = centred.T @ centred
    standard = (measures - measures.mean(0)) / measures.std(0)
    faces = identities / np.linalg.norm(identities, axis=1, keepdims=True)
    faces = faces - faces.mean(0)
    components = faces @ np.linalg.svd(faces, full_matrices=False)[2][:_IDENTITY].T
    components /= components.std(0)
    ridge = np.eye(STYLE_DIM)
    slopes = np.concatenate(
        [
            np.linalg.solve(square + _RIDGE * ridge, centred.T @ standard),
            np.linalg.solve(square + _IDENTITY_RIDGE * ridge, centred.T @ components),
        ],
        axis=1,
    )
    spread = square / len(styles) @ slopes
    effects = slopes.T @ spread
    effects += 1e-4 * np.trace(effects) / len(effects) * np.eye(len(effects))
    steps = spread @ np.linalg.inv(effects)
    return {
        name: np.ascontiguousarray(steps[:, place], np.float32)
        for place, name in enumerate(MEASURES)
    }


def main() -> None:
    """Fits the directions and writes the file."""
    from rich.progress import track

    save_file(fit(Weights(), lambda loop: track(loop, description="portraits")), _FILE)


if __name__ == "__main__":
    main()
