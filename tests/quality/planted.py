"""Portraits with faults planted among them, each known by its name: what the rules must catch, and
nothing else.
"""

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
    """reasons: those that are right for it. copies: it is made of a portrait that stays, under a
    name behind it.
    """

    name: str
    reasons: tuple[str, ...]
    # of two portraits; None: the first one's own bytes
    make: Callable[[Image, Image], Image | None]
    copies: bool = False


def blurred(one: Image, _: Image) -> Image:
    return np.asarray(cv2.GaussianBlur(one, (0, 0), one.shape[0] * 6 / 1024), np.uint8)


def moved(one: Image, _: Image) -> Image:
    """Motion blur along the diagonal, a thirtieth of the side."""
    size = one.shape[0] // 30
    return np.asarray(cv2.filter2D(one, -1, np.eye(size, dtype=np.float32) / size), np.uint8)


def dark(one: Image, _: Image) -> Image:
    return np.asarray(one * 0.12, np.uint8)


def tiny(one: Image, _: Image) -> Image:
    return np.asarray(cv2.resize(one, (120, 120), interpolation=cv2.INTER_AREA), np.uint8)


def two_faces(one: Image, other: Image) -> Image:
    return np.concatenate([one, other], axis=1)


def covered(one: Image, _: Image) -> Image:
    """Something grey and textured over all from the nose down."""
    changed = one.copy()
    texture = np.random.default_rng(0).integers(90, 130, changed[one.shape[0] * 11 // 20 :].shape)
    changed[one.shape[0] * 11 // 20 :] = texture
    return changed


def smaller(one: Image, _: Image) -> Image:
    side = one.shape[0] * 3 // 4
    return np.asarray(cv2.resize(one, (side, side), interpolation=cv2.INTER_AREA), np.uint8)


def cropped(one: Image, _: Image) -> Image:
    edge = one.shape[0] // 25
    return one[edge:-edge, edge:-edge]


FAULTS: Final = (
    Fault("blurred", ("blurred",), blurred),
    Fault("moved", ("blurred",), moved),
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
    """Write `folder`: the portraits, `each` of them spoiled by each fault, and copies; file name →
    its fault.

    A portrait is spoiled in place of staying; a copy is of one that stays. Raises ValueError for
    too few portraits.
    """
    spoils = [fault for fault in FAULTS if not fault.copies]
    needed = each * (len(spoils) + 1 + len(FAULTS) - len(spoils))
    if len(portraits) < needed:
        raise ValueError(f"{len(portraits)} portraits, expected at least {needed}")
    folder.mkdir(parents=True)
    left = iter(sorted(portraits))
    planted: dict[str, Fault] = {}
    for fault in spoils:
        for number in range(each):
            one, other = next(left), next(left) if fault.make is two_faces else None
            name = f"{fault.name}-{number:03d}.jpg"
            _write(folder / name, fault.make(_read(one), _read(other or one)))
            planted[name] = fault
    clean = list(left)
    for path in clean:
        shutil.copy(path, folder / path.name)
    sources = iter(clean)
    for fault in FAULTS:
        for number in range(each if fault.copies else 0):
            path = next(sources)
            name = f"z-{fault.name}-{number:03d}.jpg"  # the earlier stays, and names are in order
            changed = fault.make(_read(path), _read(path))
            if changed is None:
                shutil.copy(path, folder / name)
            else:
                _write(folder / name, changed)
            planted[name] = fault
    return planted


def _read(path: Path) -> Image:
    picture = cv2.imread(str(path))
    assert picture is not None, path
    return np.asarray(picture, np.uint8)


def _write(path: Path, picture: Image | None) -> None:
    assert picture is not None and cv2.imwrite(str(path), picture, [cv2.IMWRITE_JPEG_QUALITY, 88])
