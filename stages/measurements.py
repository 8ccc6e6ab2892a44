"""Computes the metrics for the quality rules, from an image, its label map and its main face.

No model is used. Metrics don't depend on the face's size in pixels, so the same threshold applies
to a face of 60 pixels and one of 400. They are finite and deterministic for any input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import cv2
import imagehash
import numpy as np
import numpy.typing as npt
import PIL.Image

from stages.annotations import Measures
from stages.codec import Image, LabelMap
from stages.record import Face
from stages.regions import LABEL_IDS, REGION_LABELS, Mask

Points = npt.NDArray[np.float64]

SHARPNESS_SIDE: Final = 160  # pixels; larger patches are reduced to it before blur is measured
# Size of the blur that Crete's metric compares with, pixels: small, as neighbouring pixels count.
BLUR_WINDOW: Final = 5
# Long side of the image that is hashed, pixels: takes a quarter of the time of a full image, and
# differs from its hash in at most 4 of 256 bits.
HASH_SIDE: Final = 128
_MIN_SIDE: Final = 8  # pixels; smaller patches have a sharpness of 0

# Mean 3D face of the 68 Multi-PIE points (used by OpenFace and hysts/ptgaze), reduced to the five
# landmarks: millimetres, x to the viewer's right, y down, z away from the viewer, origin at the
# nose tip. That face's nose is 6.8 mm above the detector's landmark; it was moved so that the
# median pitch of a thousand portraits is 0.
FACE_MM: Final[Points] = np.array(
    [
        [-32.4, -39.6, 35.3],
        [32.4, -39.6, 35.3],
        [0.0, 0.0, 0.0],
        [-28.5, 26.5, 36.7],
        [28.5, 26.5, 36.7],
    ]
)

# The area of a face that should be visible: an ellipse from the brows to below the lower lip,
# inside the face's outline, so that it excludes hair at the temples and the background beside a
# turned face.
_OVAL: Final = (46.0, -50.0, 52.0, 38.0)  # half width, top, bottom, depth; mm
_SEARCH_SCALE: Final = 1.3  # parts are searched for in a larger ellipse: brows are on its upper rim
# Bands of the oval: name, lower end (mm), labels of which some must be visible there, and their
# minimum as a share of the oval. Half or less of the smallest among a thousand portraits (0.036,
# 0.161, 0.054).
_BANDS: Final = (
    ("eyes", -20.0, ("left_brow", "right_brow", "left_eye", "right_eye", "glasses"), 0.018),
    ("nose", 13.0, ("nose",), 0.08),
    ("mouth", math.inf, ("mouth", "upper_lip", "lower_lip"), 0.027),
)
_FACE_LABELS: Final = (*REGION_LABELS["face"], "left_ear", "right_ear", "earring")
_SKIN_LABELS: Final = ("skin", "nose")


def measure(image: Image, labels: LabelMap, face: Face) -> Measures:
    """Returns all metrics.

    image: RGB (H, W, 3) uint8. labels: (H, W), CelebAMask-HQ classes. face: in pixels of the image.
    """
    grey = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)
    brightness, clipped = exposure_of(grey, labels, face)
    rotation = rotation_of(face)
    yaw, pitch, roll = angles_of(rotation)
    return Measures(
        sharpness=sharpness_of(grey, face),
        brightness=brightness,
        clipped=clipped,
        yaw=yaw,
        pitch=pitch,
        roll=roll,
        occlusion=occlusion_of(labels, face, rotation),
        hash=hash_of(grey),
    )


def sharpness_of(grey: LabelMap, face: Face) -> float:
    """Returns the sharpness of the face, 0 (blurred) to 1: how much its edges lose by further blur.

    One minus the blur metric of Crete et al. 2007 ("The blur effect"; scikit-image's
    implementation), which is independent of contrast. Measured in the upright square around eyes,
    nose and mouth, so hair and a blurred background don't count, and rolling the head changes
    little. A larger square is reduced to SHARPNESS_SIDE pixels first, a smaller one is used as it
    is.

    Counts noise as detail: a blurred image with strong noise (sigma 8 of 255) is "sharp".
    """
    # imports scipy, which takes longer than all else that a reader or writer imports for its chain
    from skimage.measure import blur_effect

    patch = _around_parts(grey, face)
    if patch.shape[0] < _MIN_SIDE or patch.shape[1] < _MIN_SIDE or np.ptp(patch) == 0:
        return 0.0
    scale = SHARPNESS_SIDE / max(patch.shape)
    if scale < 1:
        size = tuple(max(_MIN_SIDE, round(side * scale)) for side in patch.shape[::-1])
        patch = np.asarray(cv2.resize(patch, size, interpolation=cv2.INTER_AREA), np.uint8)
    blur = float(blur_effect(patch.astype(np.float32) / 255, h_size=BLUR_WINDOW))
    return min(1.0, max(0.0, 1 - blur)) if math.isfinite(blur) else 0.0


def _around_parts(grey: LabelMap, face: Face) -> LabelMap:
    """Returns the square around the landmarks, cut at the image's edges.

    Its side is 2.3 times the distance between the eyes, or between eyes and mouth if that is
    larger.
    """
    points = _landmarks(face)
    eyes, mouth = points[:2].mean(axis=0), points[3:].mean(axis=0)
    reach = 1.15 * max(np.hypot(*(points[1] - points[0])), np.hypot(*(mouth - eyes)))
    (x, y), (height, width) = (eyes + mouth) / 2, grey.shape
    rows = slice(*(int(min(max(edge, 0), height)) for edge in (y - reach, y + reach)))
    columns = slice(*(int(min(max(edge, 0), width)) for edge in (x - reach, x + reach)))
    return grey[rows, columns]


def exposure_of(grey: LabelMap, labels: LabelMap, face: Face) -> tuple[float, float]:
    """Returns (mean luma of skin and nose, share of the face's pixels with luma 0-2 or 253-255),
    both 0 to 1, inside the face's box.

    If the label map has no skin or no face there, all pixels of the box are used. Brightness can't
    distinguish dark skin from dim light; it need not, as the darkest tone of the Monk scale has a
    luma of 0.145, and well-lit skin is hardly ever darker.
    """
    x1, y1, x2, y2 = face.box
    height, width = grey.shape
    rows = slice(int(min(max(y1, 0), height - 1)), int(min(max(math.ceil(y2), y1 + 1, 1), height)))
    columns = slice(int(min(max(x1, 0), width - 1)), int(min(max(math.ceil(x2), x1 + 1, 1), width)))
    luma, inside = grey[rows, columns], labels[rows, columns]
    if not luma.size:
        return 0.0, 0.0
    skin, face_mask = _mask_of(inside, _SKIN_LABELS), _mask_of(inside, _FACE_LABELS)
    skin_luma = luma[skin] if skin.any() else luma
    face_luma = luma[face_mask] if face_mask.any() else luma
    clipped = (face_luma <= 2) | (face_luma >= 253)
    return float(skin_luma.mean()) / 255, float(clipped.mean())


def rotation_of(face: Face) -> Points:
    """Returns the rotation matrix (3, 3) from FACE_MM to the pose of the face.

    Computed with OpenCV's SQPnP (Terzakis and Lourakis 2020), which finds the globally best
    rotation without an initial guess. The distance of the real camera is unknown, as the image may
    be a crop; at the assumed distance of twenty faces the face's position in the image has no
    influence. If the landmarks lie on a line or a point, the result is a roll only.
    """
    points = _landmarks(face)
    middle, extent = points.mean(axis=0), max(float(np.ptp(points, axis=0).max()), 1.0)
    camera = np.array([[20 * extent, 0, 0], [0, 20 * extent, 0], [0, 0, 1.0]])
    centred = points - middle
    spans_plane = np.linalg.svd(centred, compute_uv=False)[1] > 1e-3 * extent  # else on a line
    if spans_plane:
        success, vector, _ = cv2.solvePnP(FACE_MM, centred, camera, None, flags=cv2.SOLVEPNP_SQPNP)
        if success:
            rotation = np.asarray(cv2.Rodrigues(vector)[0], np.float64)
            if np.isfinite(rotation).all():
                return rotation
    across = points[1] - points[0]
    angle = math.atan2(across[1], across[0])
    return np.array(
        [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1.0]]
    )


def angles_of(rotation: Points) -> tuple[float, float, float]:
    """Returns (yaw, pitch, roll) in degrees; yaw within ±90, the others within ±180.

    The rotations are applied in the order pitch, yaw, roll, so roll is the angle at which the line
    through the eyes appears in the image.
    """
    yaw = math.asin(min(1.0, max(-1.0, rotation[2, 0])))
    pitch = math.atan2(-rotation[2, 1], rotation[2, 2])
    roll = math.atan2(rotation[1, 0], rotation[0, 0])
    return math.degrees(yaw), math.degrees(pitch), math.degrees(roll)


def occlusion_of(labels: LabelMap, face: Face, rotation: Points) -> float:
    """Returns the share of the face's visible area that something else covers, 0 to 1.

    The area is an oval fitted to the landmarks and rotated as the face is. Pixels count as covered
    if the label map has something else there: background, neck, clothes, a hat, or hair above the
    nose tip (below, it is a beard). The parser often labels hands and masks as skin. So a band of
    the oval (eyes, nose, mouth) also counts as covered to the extent that its parts are missing.
    Glasses, dark ones too, belong to the face. Pixels outside the image don't count.

    Not detected: covers that leave some of each part visible, or that the parser labels as a part
    (a printed mouth; dark bars over the eyes, labelled as glasses); a covered forehead, cheek or
    chin; one covered eye of two. Too high for heads tilted by 45° or more, where the parser misses
    noses and brows.
    """
    half, top, bottom, depth = _OVAL
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x, y = half * np.cos(angle), (top + bottom) / 2 + (bottom - top) / 2 * np.sin(angle)
    to_pixels = _projection(face, rotation)
    rim = to_pixels(np.stack([x, y, np.full_like(x, depth)], axis=1))
    search_rim = rim.mean(axis=0) + (rim - rim.mean(axis=0)) * _SEARCH_SCALE
    labels, corner = _window(labels, search_rim)
    oval = _filled(rim - corner, labels.shape)
    if not oval.any():
        return 0.0
    searched, size = labels[_filled(search_rim - corner, labels.shape)], float(oval.sum())

    def above_line(y: float) -> Mask:
        return _above(to_pixels(_line_at(y)) - corner, labels.shape)

    beard = ~above_line(0.0) & (labels == LABEL_IDS["hair"])
    foreign = oval & ~_mask_of(labels, _FACE_LABELS) & ~beard
    covered, previous_bands = 0.0, np.zeros_like(oval)
    for _, end, names, min_share in _BANDS:
        up_to_end = np.ones_like(oval) if math.isinf(end) else above_line(end)
        band = up_to_end & ~previous_bands
        previous_bands = up_to_end
        missing = 1 - min(1.0, float(_mask_of(searched, names).sum()) / (min_share * size))
        covered += max(float((band & foreign).sum()), missing * float((band & oval).sum()))
    return min(1.0, covered / size)


def hash_of(grey: LabelMap) -> str:
    """Returns the perceptual hash: 64 hex digits, imagehash's DCT hash (phash) with hash_size 16.

    The hashes of two versions of an image differ in few of their 256 bits.
    """
    scale = HASH_SIDE / max(grey.shape)
    if scale < 1:
        size = tuple(max(1, round(side * scale)) for side in grey.shape[::-1])
        grey = np.asarray(cv2.resize(grey, size, interpolation=cv2.INTER_AREA), np.uint8)
    return str(imagehash.phash(PIL.Image.fromarray(grey), hash_size=16))


def _landmarks(face: Face) -> Points:
    return np.array(face.landmarks, np.float64)


def _mask_of(labels: LabelMap, names: tuple[str, ...]) -> Mask:
    """Returns a mask of the shape of `labels`, True where the label is one of `names`."""
    wanted = np.zeros(256, bool)
    wanted[[LABEL_IDS[name] for name in names]] = True
    return wanted[labels]


def _projection(face: Face, rotation: Points) -> Callable[[Points], Points]:
    """Returns a function from millimetres in the space of FACE_MM (N, 3) to pixels (N, 2):
    rotation, then the scale and shift that fit FACE_MM to the landmarks.
    """
    points = _landmarks(face)
    center = FACE_MM.mean(axis=0)
    flat = (FACE_MM - center) @ rotation[:2].T
    scale = float((flat * (points - points.mean(axis=0))).sum()) / max(float((flat**2).sum()), 1e-9)
    shift = points.mean(axis=0) - scale * (center @ rotation[:2].T)
    return lambda millimetres: scale * (millimetres @ rotation[:2].T) + shift


def _filled(outline: Points, shape: tuple[int, ...]) -> Mask:
    """Returns a mask of `shape` with the polygon `outline` (N, 2) filled."""
    canvas = np.zeros(shape, np.uint8)
    cv2.fillPoly(canvas, [np.clip(np.round(outline), -(2**14), 2**14).astype(np.int32)], 1)
    return canvas > 0


def _window(labels: LabelMap, outline: Points) -> tuple[LabelMap, Points]:
    """Returns (the part of `labels` that contains the outline, its upper left corner (x, y))."""
    limit = np.array(labels.shape[::-1])
    low = np.clip(np.floor(outline.min(axis=0)), 0, limit - 1).astype(int)
    high = np.clip(np.ceil(outline.max(axis=0)) + 1, low + 1, limit).astype(int)
    return labels[low[1] : high[1], low[0] : high[0]], low.astype(np.float64)


def _line_at(y: float) -> Points:
    """Returns two points (2, 3) in the space of FACE_MM, on the horizontal line `y` millimetres
    below the nose tip.
    """
    return np.array([[-1.0, y, _OVAL[3]], [1.0, y, _OVAL[3]]])


def _above(line: Points, shape: tuple[int, ...]) -> Mask:
    """Returns a mask of `shape`, True above the line through two points (2, 2), from the viewer's
    left to the right.
    """
    dx, dy = line[1] - line[0]
    rows, columns = np.arange(shape[0])[:, None], np.arange(shape[1])[None, :]
    above: Any = dx * (rows - line[0, 1]) - dy * (columns - line[0, 0]) < 0
    return np.asarray(above, bool)
