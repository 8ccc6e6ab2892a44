"""Draws faces from parts, with label maps, so that all words of their captions are predictable."""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np

from stages.backends.appearance import Appearance, measure_appearance
from stages.backends.attributes import compose_caption, compose_face_caption
from stages.record import Face
from stages.regions import LABEL_IDS

SIDE = 512
# skin and the white of the eyes as in ordinary light, see stages/backends/light.py
SKIN, EYES, LIPS, BROWN = (190, 142, 123), (188, 171, 166), (178, 92, 86), (90, 60, 40)
TONGUE = (208, 112, 106)
BLACK, BLUE, WHITE = (12, 10, 10), (30, 60, 150), (250, 250, 250)
ALL_PARTS = frozenset(
    {"hair", "skin", "neck", "cloth", "nose", "upper_lip", "lower_lip"}
    | {f"{side}_{part}" for side in ("left", "right") for part in ("brow", "eye", "ear")}
)


@dataclass
class Drawing:
    """An image with a frontal face on a grey background, and its label map."""

    image: np.ndarray = field(default_factory=lambda: np.full((SIDE, SIDE, 3), 120, np.uint8))
    labels: np.ndarray = field(default_factory=lambda: np.zeros((SIDE, SIDE), np.uint8))
    landmarks: tuple[tuple[float, float], ...] = (
        (206, 230),
        (306, 230),
        (256, 290),
        (212, 340),
        (300, 340),
    )

    def paint(self, name: str, mask: np.ndarray, color: tuple[int, int, int]) -> None:
        self.labels[mask] = LABEL_IDS[name]
        self.image[mask] = color

    def ellipse(
        self, name: str, center: tuple[int, int], axes: tuple[int, int], color: tuple[int, int, int]
    ) -> None:
        mask = np.zeros((SIDE, SIDE), np.uint8)
        cv2.ellipse(mask, center, axes, 0, 0, 360, 1, -1)
        self.paint(name, mask > 0, color)

    def box(
        self, name: str, x: tuple[int, int], y: tuple[int, int], color: tuple[int, int, int]
    ) -> None:
        mask = np.zeros((SIDE, SIDE), bool)
        mask[y[0] : y[1], x[0] : x[1]] = True
        self.paint(name, mask, color)

    @property
    def face(self) -> Face:
        return Face(box=(140, 120, 372, 410), landmarks=self.landmarks, score=0.9)

    def appearance(self) -> Appearance:
        return measure_appearance(self.image, self.labels, self.face)

    def captions(self, key: str = "0" * 20) -> tuple[str, str]:
        appearance = self.appearance()
        return compose_caption(appearance, key), compose_face_caption(appearance, key)


def draw(
    parts: frozenset[str] = ALL_PARTS,
    hair: tuple[int, int, int] = BROWN,
    cloth: tuple[int, int, int] = BLUE,
) -> Drawing:
    drawing = Drawing()
    ellipses = (
        ("hair", (256, 190), (150, 130), hair),
        ("left_ear", (136, 250), (16, 30), SKIN),
        ("right_ear", (376, 250), (16, 30), SKIN),
        ("neck", (256, 430), (60, 60), SKIN),
        ("skin", (256, 265), (112, 150), SKIN),
        ("left_brow", (206, 205), (30, 6), BLACK),
        ("right_brow", (306, 205), (30, 6), BLACK),
        ("left_eye", (206, 230), (18, 9), EYES),
        ("right_eye", (306, 230), (18, 9), EYES),
        ("nose", (256, 275), (20, 35), SKIN),
        ("upper_lip", (256, 335), (44, 7), LIPS),
    )
    for name, center, axes, color in ellipses:
        if name in parts:
            drawing.ellipse(name, center, axes, color)
    if "lower_lip" in parts:
        drawing.box("lower_lip", (222, 290), (342, 352), LIPS)
    if "cloth" in parts:
        drawing.box("cloth", (60, 452), (460, 512), cloth)
    return drawing
