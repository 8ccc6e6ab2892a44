"""Palette: a colour for each label of a label map. Left and right parts have different colours."""

from __future__ import annotations

from typing import Final

PALETTE: Final = (
    "#000000",  # background, which is not drawn
    "#35b3a2",  # skin
    "#f7d154",  # left_brow
    "#c9930a",  # right_brow
    "#1f5fd6",  # left_eye
    "#7cc0ff",  # right_eye
    "#9b5de5",  # glasses
    "#ff9eb5",  # left_ear
    "#e0557d",  # right_ear
    "#f4f1bb",  # earring
    "#f4873a",  # nose
    "#5e0b2b",  # mouth
    "#e63946",  # upper_lip
    "#b5179e",  # lower_lip
    "#8ac926",  # neck
    "#fff275",  # necklace
    "#4a5fc1",  # cloth
    "#8b5a9f",  # hair
    "#8d6e63",  # hat
)
