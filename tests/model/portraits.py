"""Drawn portraits for tests: an image of ellipses and its label map, different for every seed."""

import io

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from stages.record import Face, Record, key_of
from stages.regions import LABEL_IDS


def drawn(seed: int, size: int = 128) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Draws an RGB image (size, size, 3) and its label map (size, size)."""
    rng = np.random.default_rng(seed)
    image = np.full((size, size, 3), rng.integers(0, 256, 3), np.uint8)
    labels = np.zeros((size, size), np.uint8)

    def ellipse(
        label: str, centre: tuple[float, float], axes: tuple[float, float], colour: npt.ArrayLike
    ) -> None:
        middle = tuple(round(value * size) for value in centre)
        half = tuple(max(1, round(value * size)) for value in axes)
        rgb = [int(value) for value in np.asarray(colour)]
        cv2.ellipse(image, middle, half, 0, 0, 360, rgb, cv2.FILLED)
        cv2.ellipse(labels, middle, half, 0, 0, 360, LABEL_IDS[label], cv2.FILLED)

    skin, width = rng.integers(90, 250, 3), rng.uniform(0.2, 0.27)
    ellipse("cloth", (0.5, 1.0), (0.4, 0.15), rng.integers(0, 256, 3))
    ellipse("hair", (0.5, 0.42), (width + 0.08, 0.36), rng.integers(0, 120, 3))
    for side, name in ((-1, "left"), (1, "right")):
        ellipse(f"{name}_ear", (0.5 + side * (width + 0.02), 0.52), (0.05, 0.08), skin * 0.9)
    ellipse("skin", (0.5, 0.52), (width, 0.32), skin)
    eye = rng.integers(0, 256, 3)
    for side, name in ((-1, "left"), (1, "right")):
        ellipse(f"{name}_eye", (0.5 + side * 0.1, 0.45), (0.045, 0.03), eye)
    ellipse("nose", (0.5, 0.56), (0.03, 0.07), skin * 0.8)
    ellipse("upper_lip", (0.5, 0.695), (0.09, 0.02), rng.integers(0, 200, 3))
    ellipse("lower_lip", (0.5, 0.725), (0.08, 0.02), rng.integers(0, 200, 3))
    return image, labels


def record(
    seed: int,
    size: int = 128,
    caption: str = "A portrait photo of a person.",
    face_caption: str = "The person has a round face, two ears, dark eyes, a long nose, and a "
    "small mouth.",
) -> Record:
    """Returns a complete record of the drawn portrait; every seed has another identity."""
    image, labels = drawn(seed, size)
    identity = np.random.default_rng(1000 + seed).standard_normal(512).astype(np.float32)
    name = f"drawn/{seed}.png"
    return Record(
        key=key_of(name),
        source=name,
        image=png(image),
        width=size,
        height=size,
        faces=(
            Face(box=(0.0, 0.0, float(size), float(size)), landmarks=((0.0, 0.0),) * 5, score=0.9),
        ),
        face=0,
        parsing=png(labels),
        identity=identity / np.linalg.norm(identity),
        caption=caption,
        face_caption=face_caption,
    )


def png(array: npt.NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()
