"""Portrait: one picture and everything that made it, written as a PNG that carries its settings."""

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
    """pixels: (H, W, 3) uint8, RGB. prompt: as it was given. settings: name → value, as in the
    PNG's text.
    """

    pixels: npt.NDArray[np.uint8]
    prompt: str
    prompt_index: int
    image_index: int
    settings: Mapping[str, str]

    @property
    def name(self) -> str:
        """portrait-PROMPT-IMAGE.png, both counted from 0."""
        return f"portrait-{self.prompt_index:02d}-{self.image_index:02d}.png"

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)

    def save(self, folder: str | Path) -> Path:
        """Write `name` into `folder`, whole or not at all; returns its path. Equal portraits give
        equal bytes.
        """
        path = Path(folder) / self.name
        info = PngImagePlugin.PngInfo()
        for key, value in self.settings.items():
            info.add_text(key, value)  # Pillow takes iTXt for what Latin-1 can't write
        partial = path.with_name(f".{path.name}.partial")
        self.image.save(partial, "PNG", pnginfo=info)
        partial.replace(path)
        return path


def portrait_seed(seed: int, prompt_index: int, image_index: int, purpose: str = "latents") -> int:
    """The seed of a generator that serves one purpose of one picture, and of nothing else."""
    name = f"consistentid/{seed}/{prompt_index}/{image_index}/{purpose}"
    # torch takes 63 bits
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
