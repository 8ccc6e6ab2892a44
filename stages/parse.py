"""Parse: a label map of the 19 CelebAMask-HQ classes, the size of the picture.

BiSeNet was trained on FFHQ-like crops: on a half-body photograph parsed whole, brows and eyes
vanish and clothes become hats. So the picture is parsed whole for hair, neck and clothes, and,
where the face is small in it, once more on the FFHQ-aligned crop, warped back and laid over. Its
left/right labels are unreliable and are reassigned by position.
"""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np

from configs.schema import ParseConfig
from stages.align import FFHQ_512, Matrix, similarity
from stages.base import BackendStage, Dropped, reject
from stages.codec import Image, LabelMap, decode_jpeg, encode_labels
from stages.record import Face, Record

# (left, right) brow, eye, ear: "left" is the viewer's left, as in CelebAMask-HQ
PAIRS = ((2, 3), (4, 5), (7, 8))
# skin, brows, eyes, glasses, ears, earring, nose, mouth, lips; hat
HEAD_PARTS = (*range(1, 14), 18)
BACKGROUND, SKIN, CLOTH, HAIR, HAT = 0, 1, 16, 17, 18
_OUTSIDE = 255  # no label: the crop doesn't reach here


class ParseStage(BackendStage):
    name = "parse"
    version = 1
    requires = ("image", "faces", "face")
    provides = ("parsing",)
    config: ParseConfig

    def process(self, records: list[Record]) -> list[Record]:
        images = [decode_jpeg(record.image) for record in records]
        maps = self.backend.parse(images)
        close = [i for i, record in enumerate(records) if self._aligns(record)]
        if close:
            warps = [similarity(records[i].main_face, FFHQ_512) for i in close]
            crops = [aligned(images[i], warp) for i, warp in zip(close, warps, strict=True)]
            for i, warp, labels in zip(close, warps, self.backend.parse(crops), strict=True):
                maps[i] = lay_over(maps[i], labels, warp, records[i].main_face)
        return [self._answer(record, labels) for record, labels in zip(records, maps, strict=True)]

    def _aligns(self, record: Record) -> bool:
        if self.config.align != "auto":
            return self.config.align == "always"
        _, top, _, bottom = record.main_face.box
        return bottom - top < self.config.align_below * record.height

    def _answer(self, record: Record, labels: LabelMap) -> Record:
        if not (labels == SKIN).any():
            return reject(
                record, Dropped("no_face_parsed", "the parser sees no facial skin"), self.name
            )
        return replace(record, parsing=encode_labels(mend_sides(labels, record.main_face)))


def aligned(image: Image, warp: Matrix) -> Image:
    """The 512 × 512 FFHQ-style crop, grey where it reaches past the picture."""
    crop = cv2.warpAffine(
        image, warp, (512, 512), flags=cv2.INTER_LINEAR, borderValue=(135, 133, 132)
    )
    return np.asarray(crop, np.uint8)


def lay_over(whole: LabelMap, crop: LabelMap, warp: Matrix, face: Face) -> LabelMap:
    """The crop's labels where it reaches, those of the whole picture beyond.

    Beyond the crop there is nothing of this person's face. What the whole picture's pass takes for
    a face there is clothes if it lies below the chin, hair or hat if it goes on from these at the
    crop's edge, and else background or somebody else, which count as the same here.
    """
    height, width = whole.shape
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    back = cv2.warpAffine(crop, warp, (width, height), flags=flags, borderValue=_OUTSIDE)
    edge = cv2.warpAffine(crop, warp, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    above = np.where(np.isin(edge, (HAIR, HAT)), edge, BACKGROUND)
    below = np.arange(height)[:, None] > face.box[3]
    beyond = np.where(np.isin(whole, HEAD_PARTS), np.where(below, CLOTH, above), whole)
    return np.where(back == _OUTSIDE, beyond, back).astype(np.uint8)


def mend_sides(labels: LabelMap, face: Face) -> LabelMap:
    """Give each brow, eye and ear to the side of the face's midline that its component's centroid
    lies on.

    The midline runs through the middle of the eyes and the middle of the mouth (or straight down
    where these coincide).
    """
    points = np.array(face.landmarks, np.float64)
    origin = points[:2].mean(0)
    down = points[3:].mean(0) - origin
    down = down if np.hypot(*down) > 1 else np.array([0.0, 1.0])
    mended = labels.copy()
    for left, right in PAIRS:
        either = np.isin(labels, (left, right))
        if not either.any():
            continue
        count, components, _, centroids = cv2.connectedComponentsWithStats(
            either.astype(np.uint8), connectivity=8
        )
        for index in range(1, count):
            offset = centroids[index] - origin
            on_left = offset[0] * down[1] - offset[1] * down[0] < 0
            mended[components == index] = left if on_left else right
    return mended
