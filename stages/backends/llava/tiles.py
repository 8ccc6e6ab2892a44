"""Tiles: into how many a picture is divided, by models that do so (LLaVA-NeXT, OneVision).

Such a model gets the whole picture at the size of a tile, and the picture at up to several times
its size, cut into tiles. Of the published layouts it takes the one that preserves most pixels, and
of equal ones the smallest.
"""

from __future__ import annotations

from typing import Any


def use_one_tile(processor: Any, model: Any) -> None:
    """Makes a single tile the only layout, in processor and model, which must agree. Models without
    tiles are left as they are.
    """
    if getattr(model.config, "image_grid_pinpoints", None) is None:
        return
    side = model.config.vision_config.image_size
    model.config.image_grid_pinpoints = [[side, side]]
    processor.image_processor.image_grid_pinpoints = [[side, side]]
