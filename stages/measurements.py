"""The figures behind the quality rules, each measured from one picture, its label map and its
chosen face.

No network runs here, and no figure depends on the face's size in pixels, so one threshold serves a
face of 60 pixels and one of 400. Every figure is finite for any input, and the same input gives the
same figure.
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
from skimage.measure import blur_effect

from stages.annotations import Measures
from stages.codec import Image, LabelMap
from stages.record import Face
from stages.regions import LABEL_IDS, REGION_LABELS, Mask

Points = npt.NDArray[np.float64]

SHARP_AT: Final = 160  # pixels of the square around the face's parts in which blur is looked for
# Crete's second blur, pixels: small, since what counts is whether single pixels still differ
BLUR_WINDOW: Final = 5
# long side from which the hash is made: a quarter of the time, at most 4 of 256 bits off
HASH_FROM: Final = 128
_SMALLEST: Final = 8  # pixels: in less there is nothing to measure

# Mean face of the 68 Multi-PIE points (the shape that OpenFace and hysts/ptgaze use), reduced to
# five: millimetres, x to the viewer's right, y down, z away from the viewer, origin at the nose
# tip. That shape's nose is 6.8 mm further up the face than the detector's landmark: moved so that
# the median of a thousand portraits has pitch 0.
FACE_MM: Final[Points] = np.array(
    [
        [-32.4, -39.6, 35.3],
        [32.4, -39.6, 35.3],
        [0.0, 0.0, 0.0],
        [-28.5, 26.5, 36.7],
        [28.5, 26.5, 36.7],
    ]
)

# What of a face is expected to be seen: an ellipse from the brows to under the lower lip, clear of
# its outline, so that hair at the temples and the background beside a turned face stay out of it.
_OVAL: Final = (46.0, -50.0, 52.0, 38.0)  # half width, top, bottom, depth; mm
_GROWN: Final = 1.3  # parts are looked for a little beyond it: brows lie on its upper rim
# name, lower end of its band of the oval (mm), labels of which something must be seen there, and
# the least of them as a share of the oval: half or less of the smallest among a thousand portraits
# (0.036, 0.161, 0.054)
_BANDS: Final = (
    ("eyes", -20.0, ("left_brow", "right_brow", "left_eye", "right_eye", "glasses"), 0.018),
    ("nose", 13.0, ("nose",), 0.08),
    ("mouth", math.inf, ("mouth", "upper_lip", "lower_lip"), 0.027),
)
_FACE: Final = (*REGION_LABELS["face"], "left_ear", "right_ear", "earring")
_SKIN: Final = ("skin", "nose")


def measure(image: Image, labels: LabelMap, face: Face) -> Measures:
    """image: RGB (H, W, 3) uint8; labels: (H, W), CelebAMask-HQ classes; face: in pixels of the
    image.
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
    """How much a further blur takes from the face's edges: 0 nothing (blurred already) to 1 all.

    One minus the blur metric of Crete et al. 2007 ("The blur effect", scikit-image's), which
    contrast cancels out of. It is taken in the upright square around eyes, nose and mouth, so
    neither hair nor a blurred background counts, and rolling the head changes little. A larger face
    is averaged down to SHARP_AT pixels first, a smaller one is measured as it is: either way the
    question is whether neighbouring pixels of a small face still differ.

    Sees noise as detail: of a blurred picture with strong noise on top (sigma 8 of 255) it says
    "sharp".
    """
    patch = _around_parts(grey, face)
    if patch.shape[0] < _SMALLEST or patch.shape[1] < _SMALLEST or np.ptp(patch) == 0:
        return 0.0
    by = SHARP_AT / max(patch.shape)
    if by < 1:
        size = tuple(max(_SMALLEST, round(side * by)) for side in patch.shape[::-1])
        patch = np.asarray(cv2.resize(patch, size, interpolation=cv2.INTER_AREA), np.uint8)
    blur = float(blur_effect(patch.astype(np.float32) / 255, h_size=BLUR_WINDOW))
    return min(1.0, max(0.0, 1 - blur)) if math.isfinite(blur) else 0.0


def _around_parts(grey: LabelMap, face: Face) -> LabelMap:
    """The square around the landmarks, as far as the picture reaches. Its side is 2.3 eye (or
    eye-mouth) distances.
    """
    points = _landmarks(face)
    eyes, mouth = points[:2].mean(axis=0), points[3:].mean(axis=0)
    reach = 1.15 * max(np.hypot(*(points[1] - points[0])), np.hypot(*(mouth - eyes)))
    (x, y), (height, width) = (eyes + mouth) / 2, grey.shape
    rows = slice(*(int(min(max(edge, 0), height)) for edge in (y - reach, y + reach)))
    columns = slice(*(int(min(max(edge, 0), width)) for edge in (x - reach, x + reach)))
    return grey[rows, columns]


def exposure_of(grey: LabelMap, labels: LabelMap, face: Face) -> tuple[float, float]:
    """(mean luma of skin and nose, share of the face's pixels at 0-2 or 253-255), both 0..1, within
    the face's box.

    Where the parser sees no skin in the box, all of the box stands in. Brightness can't tell dark
    skin from little light, but it needn't: the darkest tone of the Monk scale has luma 0.145, well
    lit skin hardly any less.
    """
    x1, y1, x2, y2 = face.box
    height, width = grey.shape
    rows = slice(int(min(max(y1, 0), height - 1)), int(min(max(math.ceil(y2), y1 + 1, 1), height)))
    columns = slice(int(min(max(x1, 0), width - 1)), int(min(max(math.ceil(x2), x1 + 1, 1), width)))
    luma, inside = grey[rows, columns], labels[rows, columns]
    skin, whole = _of(inside, _SKIN), _of(inside, _FACE)
    of_skin = luma[skin] if skin.any() else luma
    of_face = luma[whole] if whole.any() else luma
    if not luma.size:
        return 0.0, 0.0
    return float(of_skin.mean()) / 255, float(((of_face <= 2) | (of_face >= 253)).mean())


def rotation_of(face: Face) -> Points:
    """Rotation (3 × 3) that turns FACE_MM the way the face is turned; of landmarks in a line or a
    point, only rolled.

    OpenCV's SQPnP (Terzakis and Lourakis 2020), which finds the best of all rotations without a
    first guess. The camera is set twenty faces away: where the real one stood, a cut-out picture
    doesn't say, and from there the position of the face in the picture doesn't matter.
    """
    points = _landmarks(face)
    middle, extent = points.mean(axis=0), max(float(np.ptp(points, axis=0).max()), 1.0)
    camera = np.array([[20 * extent, 0, 0], [0, 20 * extent, 0], [0, 0, 1.0]])
    centred = points - middle
    if np.linalg.svd(centred, compute_uv=False)[1] > 1e-3 * extent:  # else in a line
        done, turned, _ = cv2.solvePnP(FACE_MM, centred, camera, None, flags=cv2.SOLVEPNP_SQPNP)
        rotation = (
            np.asarray(cv2.Rodrigues(turned)[0], np.float64) if done else np.full((3, 3), np.nan)
        )
        if np.isfinite(rotation).all():
            return rotation
    across = points[1] - points[0]
    angle = math.atan2(across[1], across[0])
    return np.array(
        [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1.0]]
    )


def angles_of(rotation: Points) -> tuple[float, float, float]:
    """(yaw, pitch, roll) in degrees: the head is nodded, then turned, then tilted in the picture's
    plane.

    In this order roll is the tilt of the eyes' line as it is seen. Yaw is in ±90, the others in
    ±180.
    """
    yaw = math.asin(min(1.0, max(-1.0, rotation[2, 0])))
    pitch = math.atan2(-rotation[2, 1], rotation[2, 2])
    roll = math.atan2(rotation[1, 0], rotation[0, 0])
    return math.degrees(yaw), math.degrees(pitch), math.degrees(roll)


def occlusion_of(labels: LabelMap, face: Face, rotation: Points) -> float:
    """Share of the face that should be seen (an oval laid onto the landmarks, turned as the face
    is) and isn't, 0..1.

    Two things count as covered: pixels that the parser gives to something else (background, neck,
    clothes, a hat; hair only above the nose tip, for below it is a beard), and, since the parser
    likes to paint skin over hands and masks, the whole band of eyes, nose or mouth to the extent
    that it finds no such part there. Glasses are face, dark ones too. Beyond the picture's edge
    nothing counts.

    Doesn't see: a cover that leaves a bit of each part in view, or that the parser takes for a part
    (a printed mouth, dark bars over the eyes, which it calls glasses); a covered forehead, cheek
    rim or chin; one covered eye of two. On heads tilted by 45° and more the parser loses noses and
    brows, and the figure is too high.
    """
    half, top, bottom, depth = _OVAL
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x, y = half * np.cos(turn), (top + bottom) / 2 + (bottom - top) / 2 * np.sin(turn)
    rim = np.stack([x, y, np.full_like(x, depth)], axis=1)
    place = _placed(face, rotation)
    around = place(rim).mean(axis=0) + (place(rim) - place(rim).mean(axis=0)) * _GROWN
    labels, corner = _window(labels, around)
    oval = _filled(place(rim) - corner, labels.shape)
    if not oval.any():
        return 0.0
    near, size = labels[_filled(around - corner, labels.shape)], float(oval.sum())
    beard = ~_upper(place(_line(0.0)) - corner, labels.shape) & (labels == LABEL_IDS["hair"])
    foreign = oval & ~_of(labels, _FACE) & ~beard
    covered, above = 0.0, np.zeros_like(oval)
    for _, end, names, least in _BANDS:
        upto = (
            np.ones_like(oval)
            if math.isinf(end)
            else _upper(place(_line(end)) - corner, labels.shape)
        )
        band = upto & ~above
        above = upto
        missing = 1 - min(1.0, float(_of(near, names).sum()) / (least * size))
        covered += max(float((band & foreign).sum()), missing * float((band & oval).sum()))
    return min(1.0, covered / size)


def hash_of(grey: LabelMap) -> str:
    """64 hex digits of imagehash's DCT hash with hash_size 16; of copies of a picture few of its
    256 bits differ.
    """
    by = HASH_FROM / max(grey.shape)
    if by < 1:
        size = tuple(max(1, round(side * by)) for side in grey.shape[::-1])
        grey = np.asarray(cv2.resize(grey, size, interpolation=cv2.INTER_AREA), np.uint8)
    return str(imagehash.phash(PIL.Image.fromarray(grey), hash_size=16))


def _landmarks(face: Face) -> Points:
    return np.array(face.landmarks, np.float64)


def _of(labels: LabelMap, names: tuple[str, ...]) -> Mask:
    wanted = np.zeros(256, bool)
    wanted[[LABEL_IDS[name] for name in names]] = True
    return wanted[labels]


def _placed(face: Face, rotation: Points) -> Callable[[Points], Points]:
    """A function from millimetres of FACE_MM (n, 3) to pixels (n, 2): turned, scaled and shifted
    onto the landmarks.
    """
    points = _landmarks(face)
    flat = (FACE_MM - FACE_MM.mean(axis=0)) @ rotation[:2].T
    scale = float((flat * (points - points.mean(axis=0))).sum()) / max(float((flat**2).sum()), 1e-9)
    shift = points.mean(axis=0) - scale * (FACE_MM.mean(axis=0) @ rotation[:2].T)
    return lambda given: scale * (given @ rotation[:2].T) + shift


def _filled(outline: Points, shape: tuple[int, ...]) -> Mask:
    canvas = np.zeros(shape, np.uint8)
    cv2.fillPoly(canvas, [np.clip(np.round(outline), -(2**14), 2**14).astype(np.int32)], 1)
    return canvas > 0


def _window(labels: LabelMap, outline: Points) -> tuple[LabelMap, Points]:
    """The part of the labels that holds the outline, and its upper left corner (x, y)."""
    limit = np.array(labels.shape[::-1])
    low = np.clip(np.floor(outline.min(axis=0)), 0, limit - 1).astype(int)
    high = np.clip(np.ceil(outline.max(axis=0)) + 1, low + 1, limit).astype(int)
    return labels[low[1] : high[1], low[0] : high[0]], low.astype(np.float64)


def _line(y: float) -> Points:
    """Two points of FACE_MM's space on the line that crosses the face `y` millimetres below the
    nose tip.
    """
    return np.array([[-1.0, y, _OVAL[3]], [1.0, y, _OVAL[3]]])


def _upper(line: Points, shape: tuple[int, ...]) -> Mask:
    """The pixels above the line through two points (x, y), the first of them on the face's left."""
    (dx, dy), rows, columns = (
        line[1] - line[0],
        np.arange(shape[0])[:, None],
        np.arange(shape[1])[None, :],
    )
    above: Any = dx * (rows - line[0, 1]) - dy * (columns - line[0, 0]) < 0
    return np.asarray(above, bool)
