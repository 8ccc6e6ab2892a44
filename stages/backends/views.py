"""What a captioner is shown of a record: the picture in a square, and the crop of a small face.

Images are RGB uint8 (H, W, 3).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import cv2
import numpy as np

from stages.backends.protocols import Kind
from stages.codec import Image, decode_jpeg, encode_jpeg, jpeg_size
from stages.record import Record

Colour = tuple[int, int, int]

CLIP_MEAN: Final[Colour] = (122, 116, 104)  # the mean colour of CLIP's training images
CROP_SIDE: Final = 448  # pixels of the crop of a face
_MARGIN: Final = 2.0  # side of the crop, in sides of the face's box
_QUALITY: Final = 95  # of the JPEGs for a server
_PROBE: Final = (64, 128)  # width and height, pixels


def square(image: Image, colour: Colour) -> Image:
    """Returns the image in the centre of a square of this colour, whose side is the image's longer
    one.
    """
    height, width = image.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    borders = (top, side - height - top, left, side - width - left)
    return np.asarray(cv2.copyMakeBorder(image, *borders, cv2.BORDER_CONSTANT, value=colour))


@lru_cache(maxsize=1)
def square_jpeg(jpeg: bytes) -> bytes:
    """Returns a JPEG of the image in a square of CLIP_MEAN; that of a square image as it is. The
    last result is kept, for the second prompt about a picture.
    """
    height, width = jpeg_size(jpeg)
    if height == width:
        return jpeg
    return encode_jpeg(square(decode_jpeg(jpeg), CLIP_MEAN), _QUALITY)


def padding_colour(processor: Any) -> Colour | None:
    """Returns the mean colour of an image processor of transformers that cuts off the ends of tall
    and wide images, such as LLaVA-1.5's; None if the processor keeps them.

    Tried out, since the setting `do_center_crop` doesn't tell: LLaVA-NeXT has it, and keeps all.
    """
    from PIL.Image import fromarray

    width, height = _PROBE
    plain = np.zeros((height, width, 3), np.uint8)
    other = plain.copy()
    other[: height // 8] = 255
    one, two = (processor(images=[fromarray(p)], return_tensors="pt") for p in (plain, other))
    if not all(np.array_equal(one[name], two[name]) for name in one):
        return None
    red, green, blue = (int(255 * mean) for mean in processor.image_mean)
    return red, green, blue


def face_height(record: Record) -> float:
    """Returns the height of the main face's box as a share of the image's longer side, 0 to 1.

    That is its share of what a model sees that gets the image in a square. Raises ValueError if
    there is no main face.
    """
    height, width = jpeg_size(record.image)
    _, top, _, bottom = record.main_face.box
    return max(0.0, min(bottom, height) - max(top, 0.0)) / max(height, width)


def has_small_face(record: Record, below: float) -> bool:
    """Returns whether `face_height` is under `below`. If that is 0, no main face is needed."""
    return below > 0 and face_height(record) < below


def face_crop(record: Record) -> Image:
    """Returns a square around the main face, scaled to CROP_SIDE. The square's side is twice that
    of the face's box, at most the image's shorter side; it lies inside the image.
    """
    image = decode_jpeg(record.image)
    height, width = image.shape[:2]
    x1, y1, x2, y2 = record.main_face.box
    side = max(1, min(round(_MARGIN * max(x2 - x1, y2 - y1)), height, width))
    left = min(max(round((x1 + x2 - side) / 2), 0), width - side)
    top = min(max(round((y1 + y2 - side) / 2), 0), height - side)
    crop = image[top : top + side, left : left + side]
    method = cv2.INTER_AREA if side > CROP_SIDE else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(crop, (CROP_SIDE, CROP_SIDE), interpolation=method), np.uint8)


def images(record: Record, kind: Kind, padding: Colour | None, below: float) -> list[Image]:
    """Returns what is shown for a caption of this kind: the picture, in a square of the colour
    `padding` unless that is None; and for the face caption, the crop of a small face.
    """
    picture = decode_jpeg(record.image)
    shown = [picture if padding is None else square(picture, padding)]
    return [*shown, face_crop(record)] if kind == 1 and has_small_face(record, below) else shown


def shapes(record: Record, kind: Kind, pad: bool, below: float) -> list[tuple[int, int]]:
    """Returns (height, width) of what `images` returns, without decoding it."""
    height, width = jpeg_size(record.image)
    side = max(height, width)
    shown = [(side, side) if pad else (height, width)]
    is_cropped = kind == 1 and has_small_face(record, below)
    return [*shown, (CROP_SIDE, CROP_SIDE)] if is_cropped else shown


def jpegs(record: Record, kind: Kind, pad: bool, below: float) -> tuple[bytes, ...]:
    """Returns the JPEGs of what is shown for a caption of this kind, as `images` does. A picture
    that isn't padded is the record's own JPEG.
    """
    shown = (square_jpeg(record.image) if pad else record.image,)
    if kind == 0 or not has_small_face(record, below):
        return shown
    return (*shown, encode_jpeg(face_crop(record), _QUALITY))
