"""Generates families of portraits: several pictures of one synthetic person.

The pictures of a person differ in pose, expression, light, hair colour and glasses. A picture is
used if two recognisers take it for the same person as the first one.

    FOLDER/SEED-00000/0.jpg 1.jpg …    a folder for each person
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from pipelines.demo.directions import DETECT, EMBED, largest_face, load_directions, reduced
from pipelines.demo.synthesize import Style, Synthesizer
from stages.backends.arcface import ArcFace, crop
from stages.backends.scrfd import Scrfd
from stages.backends.sface import SFace
from stages.backends.weights import Weights
from stages.codec import Image, encode_jpeg
from stages.record import FloatArray

TRUNCATION: Final = 0.75  # wider than that of single portraits: people differ more
QUALITY: Final = 95
# The part of a portrait that a picture shows, as (top, left, side) in shares of the portrait. The
# generator leaves much room around the face; small pictures show more of the face without it.
FRAME: Final = (0.13, 0.1, 0.8)
# Range of the random step from the first picture along each direction, in standard deviations of
# the measure. Glasses appear from a step of 2 to 4 on.
REACH: Final = {
    "yaw": (-1.2, 1.2),
    "pitch": (-1.0, 1.0),
    "smile": (-3.0, 3.0),
    "brightness": (-2.0, 2.0),
    "glasses": (-3.0, 5.0),
    "hair": (-2.5, 2.0),
}
# Cosines from which each recogniser takes two pictures for one person. Both are above the published
# thresholds: of two people whom both recognisers confuse, the trainer would learn to mix them.
ARCFACE: Final = 0.45
SFACE: Final = 0.45
TRIES: Final = 3  # for each picture, at shorter and shorter distances


class Families:
    """Makes the pictures of a person, which depend on (seed, person) only.

    Raises WeightsError if a network can't be fetched.
    """

    def __init__(self, weights: Weights | None = None) -> None:
        weights = weights or Weights()
        self._synthesizer = Synthesizer(weights)
        self._directions = load_directions()
        self._detector = Scrfd(DETECT, weights)
        self._arcface, self._sface = ArcFace(EMBED, weights), SFace(weights)

    def pictures(self, seed: int, person: int, count: int, side: int) -> list[Image]:
        """Returns up to `count` pictures, RGB (side, side, 3); the first is the person's own style.

        There are fewer where the recognisers refuse all tries, and none if the first picture has no
        face.
        """
        style = self._synthesizer.style(seed, person, TRUNCATION)
        first = self._picture(style, side)
        embeddings = self._embed(first)
        if embeddings is None:
            return []
        pictures = [first]
        for number in range(1, count):
            for attempt in range(TRIES):
                step = self._step(seed, person, number) * 0.7**attempt
                picture = self._picture(style + step, side)
                if self._is_same(embeddings, self._embed(picture)):
                    pictures.append(picture)
                    break
        return pictures

    def _picture(self, style: Style, side: int) -> Image:
        portrait = self._synthesizer.render(style)
        top, left, size = (round(share * len(portrait)) for share in FRAME)
        return reduced(portrait[top : top + size, left : left + size], side)

    def _step(self, seed: int, person: int, number: int) -> Style:
        draws = np.random.Generator(np.random.PCG64([seed, person, number]))
        step = np.zeros_like(next(iter(self._directions.values())))
        for name, (low, high) in REACH.items():
            step += np.float32(draws.uniform(low, high)) * self._directions[name]
        return step[None]

    def _embed(self, picture: Image) -> tuple[FloatArray, FloatArray] | None:
        face = largest_face(self._detector, picture)
        if face is None:
            return None
        aligned = [crop(picture, face)]
        return self._arcface.embed_crops(aligned)[0], self._sface.embed_crops(aligned)[0]

    @staticmethod
    def _is_same(
        first: tuple[FloatArray, FloatArray], other: tuple[FloatArray, FloatArray] | None
    ) -> bool:
        if other is None:
            return False
        cosines = [
            float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
            for a, b in zip(first, other, strict=True)
        ]
        return cosines[0] >= ARCFACE and cosines[1] >= SFACE


def write_families(
    folder: Path,
    *,
    people: int,
    pictures: int,
    seed: int,
    side: int,
    weights: Weights | None = None,
) -> Iterator[int]:
    """Writes the pictures of people 0 to `people` - 1; yields the number of pictures of each person
    once they exist. People whose folder exists already are left unchanged.

    side: of the pictures, in pixels.
    """
    families: Families | None = None
    for person in range(people):
        target = folder / f"{seed}-{person:05d}"
        if not target.exists():
            families = families or Families(weights)
            partial = folder / f".{target.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for number, picture in enumerate(families.pictures(seed, person, pictures, side)):
                (partial / f"{number}.jpg").write_bytes(encode_jpeg(picture, QUALITY))
            partial.rename(target)
        yield sum(1 for _ in target.iterdir())
