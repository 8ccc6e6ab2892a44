"""Plants faults among portraits, for which the rules must drop exactly the planted images."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import cv2
import numpy as np

from stages.codec import Image


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind of planted image.

    reasons: the right reasons to drop it. make: makes it from two portraits; None stands for the
    bytes of the first one's file. copies: whether it duplicates a portrait that is an input too,
    with a name that sorts before the duplicate's; otherwise it replaces the portrait.
    """

    name: str
    reasons: tuple[str, ...]
    make: Callable[[Image, Image], Image | None]
    copies: bool = False


def blurred(one: Image, _: Image) -> Image:
    return np.asarray(cv2.GaussianBlur(one, (0, 0), one.shape[0] * 6 / 1024), np.uint8)


def motion_blurred(one: Image, _: Image) -> Image:
    """Blurs along the diagonal, over a thirtieth of the side."""
    size = one.shape[0] // 30
    return np.asarray(cv2.filter2D(one, -1, np.eye(size, dtype=np.float32) / size), np.uint8)


def dark(one: Image, _: Image) -> Image:
    return np.asarray(one * 0.12, np.uint8)


def tiny(one: Image, _: Image) -> Image:
    return np.asarray(cv2.resize(one, (120, 120), interpolation=cv2.INTER_AREA), np.uint8)


def two_faces(one: Image, other: Image) -> Image:
    return np.concatenate([one, other], axis=1)


def covered(one: Image, _: Image) -> Image:
    """Covers everything below the nose with a grey texture."""
    image = one.copy()
    top = one.shape[0] * 11 // 20
    image[top:] = np.random.default_rng(0).integers(90, 130, image[top:].shape)
    return image


def smaller(one: Image, _: Image) -> Image:
    side = one.shape[0] * 3 // 4
    return np.asarray(cv2.resize(one, (side, side), interpolation=cv2.INTER_AREA), np.uint8)


def cropped(one: Image, _: Image) -> Image:
    edge = one.shape[0] // 25
    return one[edge:-edge, edge:-edge]


FAULTS: Final = (
    Fault("blurred", ("blurred",), blurred),
    Fault("motion-blur", ("blurred",), motion_blurred),
    Fault("dark", ("too_dark",), dark),
    Fault("tiny", ("low_resolution",), tiny),
    Fault("two-faces", ("too_many_faces",), two_faces),
    Fault("covered", ("occluded",), covered),
    Fault("copied", ("duplicate",), lambda one, _: None, copies=True),
    Fault("re-encoded", ("near_duplicate",), lambda one, _: one, copies=True),
    Fault("smaller", ("near_duplicate",), smaller, copies=True),
    Fault("cropped", ("near_duplicate", "face_duplicate"), cropped, copies=True),
)


def plant(portraits: Sequence[Path], folder: Path, each: int) -> dict[str, Fault]:
    """Writes `folder` with the portraits and `each` images of every fault.

    Returns the fault of each planted file, by name. Raises ValueError for too few portraits.
    """
    replacing = [fault for fault in FAULTS if not fault.copies]
    needed = each * (len(FAULTS) + 1)  # two_faces takes two portraits
    if len(portraits) < needed:
        raise ValueError(f"{len(portraits)} portraits, expected at least {needed}")
    folder.mkdir(parents=True)
    remaining = iter(sorted(portraits))
    planted: dict[str, Fault] = {}
    for fault in replacing:
        for number in range(each):
            one, other = next(remaining), next(remaining) if fault.make is two_faces else None
            name = f"{fault.name}-{number:03d}.jpg"
            _write(folder / name, fault.make(_read(one), _read(other or one)))
            planted[name] = fault
    clean = list(remaining)
    for path in clean:
        shutil.copy(path, folder / path.name)
    sources = iter(clean)
    for fault in FAULTS:
        for number in range(each if fault.copies else 0):
            path = next(sources)
            name = f"z-{fault.name}-{number:03d}.jpg"  # of duplicates, the first by name is written
            image = fault.make(_read(path), _read(path))
            if image is None:
                shutil.copy(path, folder / name)
            else:
                _write(folder / name, image)
            planted[name] = fault
    return planted


def _read(path: Path) -> Image:
    image = cv2.imread(str(path))
    assert image is not None, path
    return np.asarray(image, np.uint8)


def _write(path: Path, image: Image | None) -> None:
    assert image is not None and cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, 88])
