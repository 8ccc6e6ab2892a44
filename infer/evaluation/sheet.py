"""A contact sheet of people: each photograph beside portraits, with their similarities below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from infer.evaluation.faces import MeasuredPicture
from infer.evaluation.resemblance import likeness

_TILE: Final = 192  # pixels, side of a picture
_GAP: Final = 12
_MARGIN: Final = 28
_TEXT: Final = 15  # pixels
_LINE: Final = 20
_PAPER: Final = (250, 249, 246)
_INK: Final = (34, 34, 38)
_GREY: Final = (110, 108, 104)


@dataclass(frozen=True, slots=True)
class PersonRow:
    """person: in the references. portraits: by prompt, in the columns' order."""

    person: str
    portraits: Mapping[str, Sequence[MeasuredPicture]]


def people_sheet(
    rows: Sequence[PersonRow], references: Mapping[str, MeasuredPicture]
) -> PILImage.Image:
    """Draws the sheet, RGB: a row for each person, under their prompts' headings.

    references: the photographs of these people, and of those with whom portraits are compared.
    Raises ValueError without a row or a portrait.
    """
    if not rows or not any(rows[0].portraits.values()):
        raise ValueError("rows is empty; a sheet needs at least one person with a portrait")
    prompts = [*rows[0].portraits]
    counts = [len(rows[0].portraits[prompt]) for prompt in prompts]
    step = _TILE + _GAP
    left = _MARGIN + step + _GAP  # of the first portrait
    width = left + sum(counts) * step + _GAP * (len(prompts) - 1) + _MARGIN - _GAP
    top = _MARGIN + 2 * _LINE
    height = top + len(rows) * (_TILE + 2 * _LINE + _GAP) + _MARGIN - _GAP
    sheet = PILImage.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), "the photograph", fill=_GREY, font=_font())
    lefts = []
    for prompt, count in zip(prompts, counts, strict=True):
        draw.text((left, _MARGIN), _fitted(prompt, count * step), fill=_INK, font=_font())
        lefts.append(left)
        left += count * step + _GAP
    for number, row in enumerate(rows):
        y = top + number * (_TILE + 2 * _LINE + _GAP)
        sheet.paste(_tile(references[row.person]), (_MARGIN, y))
        for prompt, x in zip(prompts, lefts, strict=True):
            for place, portrait in enumerate(row.portraits[prompt]):
                corner = (x + place * step, y)
                sheet.paste(_tile(portrait), corner)
                _write_likeness(draw, portrait, row.person, references, corner)
    return sheet


def _write_likeness(
    draw: ImageDraw.ImageDraw,
    portrait: MeasuredPicture,
    person: str,
    references: Mapping[str, MeasuredPicture],
    corner: tuple[int, int],
) -> None:
    """Writes the cosines to the person and to the nearest other one below a portrait."""
    x, y = corner[0], corner[1] + _TILE + 2
    compared = likeness(portrait, person, references)
    if compared is None:
        draw.text((x, y), "no face", fill=_GREY, font=_font())
        return
    draw.text((x, y), f"{compared.right:.2f} this person", fill=_INK, font=_font())
    draw.text((x, y + _LINE - 2), f"{compared.nearest:.2f} nearest other", fill=_GREY, font=_font())


def _tile(picture: MeasuredPicture) -> PILImage.Image:
    image = PILImage.fromarray(picture.picture)
    method = PILImage.Resampling.BICUBIC if image.width < _TILE else PILImage.Resampling.LANCZOS
    return image.resize((_TILE, _TILE), method)


def _fitted(text: str, width: int) -> str:
    """Returns the text, cut so that it isn't wider than `width` pixels."""
    font = _font()
    while text and font.getlength(text) > width:
        text = f"{text.rstrip('…')[:-1]}…" if len(text) > 1 else ""
    return text


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_TEXT)  # part of Pillow, so no font file is needed
