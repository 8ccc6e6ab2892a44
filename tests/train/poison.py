"""A data set with a sample whose picture is noise."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def with_noise(data: Path, folder: Path, place: int) -> str:
    """Copies a data set to `folder`, where the picture of its sample at `place` is noise. Returns
    the sample's key. Its digest isn't changed, so read it with verify_samples=False.
    """
    shutil.copytree(data, folder)
    tars = sorted(folder.glob("shards/fgid-??????.tar"))
    images = []
    for path in tars:
        with tarfile.open(path) as archive:
            images += [(path, m) for m in archive if m.name.endswith(".jpg")]
    tar, member = images[place]
    noise = np.random.default_rng(0).integers(0, 2, (64, 64, 3), np.uint8) * 255
    with tarfile.open(tar) as archive:
        stored = archive.extractfile(member)
        assert stored is not None
        side = Image.open(stored).size
    picture = Image.fromarray(noise).resize(side, Image.Resampling.NEAREST)
    for quality in range(90, 0, -5):
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=quality)
        if len(stream.getvalue()) <= member.size:
            break
    with tar.open("r+b") as file:
        file.seek(member.offset_data)
        file.write(stream.getvalue().ljust(member.size, b"\0"))
    return member.name.removesuffix(".jpg")
