"""Parse: makes a label map of the 19 CelebAMask-HQ classes, of the image's size.

BiSeNet was trained on FFHQ-like crops: in a half-body photograph it misses brows and eyes and
labels clothes as hats. So the whole image is parsed for hair, neck and clothes, and if the face is
small in it, the FFHQ-aligned crop is parsed too, and its labels are warped back over those of the
image. BiSeNet's left and right labels are unreliable; they are reassigned by position.
"""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np

from configs.schema import ParseConfig
from stages.align import FFHQ_512, Matrix, similarity_transform
from stages.base import BackendStage, Dropped, reject
from stages.codec import Image, LabelMap, decode_jpeg, encode_labels
from stages.record import Face, Record

# labels of (left, right) brow, eye, ear; "left" is the viewer's left, as in CelebAMask-HQ
PAIRS = ((2, 3), (4, 5), (7, 8))
# skin, brows, eyes, glasses, ears, earring, nose, mouth, lips; hat
HEAD_PARTS = (*range(1, 14), 18)
BACKGROUND, SKIN, CLOTH, HAIR, HAT = 0, 1, 16, 17, 18
_OUTSIDE = 255  # not a label: a pixel outside the crop


class ParseStage(BackendStage):
    name = "parse"
    version = 1
    requires = ("image", "faces", "face")
    provides = ("parsing",)
    config: ParseConfig

    def process(self, records: list[Record]) -> list[Record]:
        images = [decode_jpeg(record.image) for record in records]
        label_maps = self.backend.parse(images)
        small = [i for i, record in enumerate(records) if self._needs_crop(record)]
        if small:
            matrices = [similarity_transform(records[i].main_face, FFHQ_512) for i in small]
            crops = [
                align_crop(images[i], matrix) for i, matrix in zip(small, matrices, strict=True)
            ]
            crop_maps = self.backend.parse(crops)
            for i, matrix, labels in zip(small, matrices, crop_maps, strict=True):
                label_maps[i] = overlay_crop(label_maps[i], labels, matrix, records[i].main_face)
        return [
            self._with_parsing(record, labels)
            for record, labels in zip(records, label_maps, strict=True)
        ]

    def _needs_crop(self, record: Record) -> bool:
        if self.config.align != "auto":
            return self.config.align == "always"
        _, top, _, bottom = record.main_face.box
        return bottom - top < self.config.align_below * record.height

    def _with_parsing(self, record: Record, labels: LabelMap) -> Record:
        if not (labels == SKIN).any():
            return reject(
                record, Dropped("no_face_parsed", "the parser sees no facial skin"), self.name
            )
        return replace(record, parsing=encode_labels(assign_sides(labels, record.main_face)))


def align_crop(image: Image, matrix: Matrix) -> Image:
    """Returns the FFHQ-aligned crop (512, 512, 3); grey where it extends beyond the image."""
    crop = cv2.warpAffine(
        image, matrix, (512, 512), flags=cv2.INTER_LINEAR, borderValue=(135, 133, 132)
    )
    return np.asarray(crop, np.uint8)


def overlay_crop(whole: LabelMap, crop: LabelMap, matrix: Matrix, face: Face) -> LabelMap:
    """Returns the label map (H, W) `whole` with the labels of `crop` (512, 512) where that reaches.

    matrix: from the image to the crop. Nothing outside the crop belongs to this person's face.
    Labels of a head there become clothes if they lie below the chin, hair or hat if these are at
    the crop's nearest edge, else background, which other people count as too.
    """
    height, width = whole.shape
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    size = (width, height)
    back = cv2.warpAffine(crop, matrix, size, flags=flags, borderValue=_OUTSIDE)
    edge = cv2.warpAffine(crop, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    above_chin = np.where(np.isin(edge, (HAIR, HAT)), edge, BACKGROUND)
    is_below_chin = np.arange(height)[:, None] > face.box[3]
    head = np.where(is_below_chin, CLOTH, above_chin)
    outside = np.where(np.isin(whole, HEAD_PARTS), head, whole)
    return np.where(back == _OUTSIDE, outside, back).astype(np.uint8)


def assign_sides(labels: LabelMap, face: Face) -> LabelMap:
    """Returns the label map with each component of brows, eyes and ears labelled left or right.

    The side of its centroid decides, relative to the face's midline: the line through the middle of
    the eyes and the middle of the mouth, vertical if these coincide.
    """
    points = np.array(face.landmarks, np.float64)
    origin = points[:2].mean(0)
    down = points[3:].mean(0) - origin
    down = down if np.hypot(*down) > 1 else np.array([0.0, 1.0])
    assigned = labels.copy()
    for left, right in PAIRS:
        either = np.isin(labels, (left, right))
        if not either.any():
            continue
        count, components, _, centroids = cv2.connectedComponentsWithStats(
            either.astype(np.uint8), connectivity=8
        )
        for index in range(1, count):
            offset = centroids[index] - origin
            is_left = offset[0] * down[1] - offset[1] * down[0] < 0
            assigned[components == index] = left if is_left else right
    return assigned
