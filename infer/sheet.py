"""The contact sheet: an image of the photograph and the portraits, in rows under their prompts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from infer.identity import Identity
from infer.portrait import Portrait

_TILE: Final = 256  # pixels, short side of a portrait on the sheet
_COLUMNS: Final = 4
_MARGIN: Final = 40
_GAP: Final = 16
_TEXT: Final = 18  # pixels
_SMALL: Final = 14
_LINE: Final = 1.4  # height of a line, as a multiple of the text's size
_PAPER: Final = (250, 249, 246)
_INK: Final = (34, 34, 38)
_GREY: Final = (120, 118, 114)


@dataclass(frozen=True, slots=True)
class _Row:
    """A prompt's part of the sheet. label: the prompt's lines."""

    label: list[str]
    tiles: list[Image.Image]


def contact_sheet(identity: Identity, portraits: Sequence[Portrait]) -> Image.Image:
    """Draws the contact sheet, RGB. Portraits with the same prompt must follow each other.

    Raises ValueError without a portrait.
    """
    if not portraits:
        raise ValueError("portraits is empty; a contact sheet needs at least one portrait")
    width = max(_fit(portrait.image).width for portrait in portraits)
    columns = min(
        _COLUMNS, max(len(list(group)) for _, group in groupby(portraits, lambda p: p.prompt_index))
    )
    # at least two tiles wide, so that a line of a label has room for a few words
    right = max(columns * (width + _GAP) - _GAP, 2 * _TILE)
    rows = [
        _Row(
            label=_wrapped(group[0].prompt, _font(_TEXT), right),
            tiles=[_fit(portrait.image) for portrait in group],
        )
        for _, members in groupby(portraits, lambda p: p.prompt_index)
        if (group := list(members))
    ]
    reference = _reference(identity)
    line = round(_TEXT * _LINE)
    footer = _wrapped(_summary(portraits[0]), _font(_SMALL), reference.width + _GAP * 2 + right)
    body = sum(_row_height(row, columns, line) for row in rows) + _MARGIN // 2 * (len(rows) - 1)
    body = max(body, line + _GAP // 2 + reference.height)
    foot = round(_SMALL * _LINE)
    size = (3 * _MARGIN + reference.width + right, 2 * _MARGIN + body + _GAP + foot * len(footer))
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)

    draw.text((_MARGIN, _MARGIN), "the photograph", fill=_GREY, font=_font(_TEXT))
    sheet.paste(reference, (_MARGIN, _MARGIN + line + _GAP // 2))
    left, top = 2 * _MARGIN + reference.width, _MARGIN
    for row in rows:
        _draw_row(sheet, draw, row, (left, top), columns, line)
        top += _row_height(row, columns, line) + _MARGIN // 2
    for number, text in enumerate(footer):
        draw.text(
            (_MARGIN, _MARGIN + body + _GAP + number * foot), text, fill=_GREY, font=_font(_SMALL)
        )
    return sheet


def _draw_row(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    row: _Row,
    corner: tuple[int, int],
    columns: int,
    line: int,
) -> None:
    left, top = corner
    for text in row.label:
        draw.text((left, top), text, fill=_INK, font=_font(_TEXT))
        top += line
    top += _GAP // 2
    for number, tile in enumerate(row.tiles):
        x, y = number % columns, number // columns
        sheet.paste(tile, (left + x * (tile.width + _GAP), top + y * (tile.height + _GAP)))


def _row_height(row: _Row, columns: int, line: int) -> int:
    lines = -(-len(row.tiles) // columns)
    return line * len(row.label) + _GAP // 2 + lines * (row.tiles[0].height + _GAP) - _GAP


def _fit(image: Image.Image) -> Image.Image:
    """Scales the short side to _TILE pixels."""
    scale = _TILE / min(image.size)
    method = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS
    return image.resize((round(image.width * scale), round(image.height * scale)), method)


def _reference(identity: Identity) -> Image.Image:
    with Image.open(io.BytesIO(identity.record.image)) as file:
        return _fit(file.convert("RGB"))


def _summary(portrait: Portrait) -> str:
    settings = portrait.settings
    parts = [
        settings["photo"],
        f"{settings['spec']}, {settings['mode']}",
        settings["scheduler"].removesuffix("Scheduler"),
        f"{settings['steps']} steps, regions from {settings['start_merge_step']}",
        f"guidance {settings['guidance_scale']}",
        f"seed {settings['seed']}",
        f"adapter {settings['adapter_sha256'][:12] or 'unnamed'}",
    ]
    return "  ·  ".join(parts)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # part of Pillow, so no font file is needed


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    """Breaks a text into lines of at most `width` pixels; a longer word has a line to itself."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
