"""Portrait: a generated image with its settings, written as a PNG that has them as metadata."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Portrait:
    """A generated image.

    pixels: (H, W, 3) uint8, RGB. prompt: the user's, without the template. settings: name → value,
    the PNG's text metadata.
    """

    pixels: npt.NDArray[np.uint8]
    prompt: str
    prompt_index: int
    image_index: int
    settings: Mapping[str, str]

    @property
    def name(self) -> str:
        """The file name, portrait-PROMPT-IMAGE.png; both numbers count from 0."""
        return f"portrait-{self.prompt_index:02d}-{self.image_index:02d}.png"

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)

    def save(self, folder: str | Path) -> Path:
        """Writes `name` into `folder` and returns its path. Equal portraits give equal bytes.

        The file is written under another name, then renamed.
        """
        path = Path(folder) / self.name
        info = PngImagePlugin.PngInfo()
        for key, value in self.settings.items():
            info.add_text(key, value)  # as iTXt where the text isn't Latin-1
        partial = path.with_name(f".{path.name}.partial")
        self.image.save(partial, "PNG", pnginfo=info)
        partial.replace(path)
        return path


def portrait_seed(seed: int, prompt_index: int, image_index: int) -> int:
    """Returns the seed of an image's random generator, in [0, 2**63)."""
    name = f"consistentid/{seed}/{prompt_index}/{image_index}"
    # 63 bits are the most that torch accepts
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
