"""Panes: an inspected picture beside its labels, as half blocks in a terminal or as one PNG.

Boxes and landmarks are drawn after the picture has its size, so that they are seen at any. A
picture that is gone has a thumbnail, and its faces are drawn on that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import cv2
import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from rich.color import Color
from rich.style import Style
from rich.text import Text

from configs.errors import PipelineError
from pipelines.inspect.find import Inspection
from pipelines.report.palette import PALETTE
from stages.codec import Image, LabelMap, decode_jpeg, decode_labels
from stages.regions import LABELS
from stages.storage.sidecar import Row

Panes = list[Image]

COLORS: Final = np.array([list(bytes.fromhex(color[1:])) for color in PALETTE], np.uint8)
_CHOSEN: Final = (0, 255, 90)
_OTHER: Final = (255, 200, 0)
_POINT: Final = (255, 40, 80)
_MIXED: Final = 0.55  # of the labels' colours, over the picture
_LEGEND: Final = 300  # width, pixels
_LINE: Final = 24
_MARGIN: Final = 14
_BACK: Final = (24, 26, 30)
_INK: Final = (230, 232, 236)
_FAINT: Final = (120, 124, 132)


def panes(found: Inspection, width: int = 0) -> Panes:
    """The picture with its faces, and the same under its labels' colours where it has a label map:
    RGB, of one size.

    width: of each, pixels; never larger than it is, 0 for its own size. Empty where there is no
    picture.
    """
    picture, labels = _pixels(found)
    if picture is None:
        return []
    scale = min(1.0, width / picture.shape[1]) if width else 1.0
    size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    photo = np.array(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
    shown = [photo]
    if labels is not None:
        small = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST_EXACT)
        colored = cv2.addWeighted(photo, 1 - _MIXED, COLORS[small], _MIXED, 0)
        shown.append(np.where((small == 0)[:, :, None], photo // 2, colored).astype(np.uint8))
    _draw_faces(photo, found.row)
    return shown


def _pixels(found: Inspection) -> tuple[Image | None, LabelMap | None]:
    row, record = found.row, found.record
    if record is not None:
        return decode_jpeg(record.image), decode_labels(record.parsing)
    if not row["thumbnail"]:
        return None, None
    picture = cv2.imdecode(np.frombuffer(row["thumbnail"], np.uint8), cv2.IMREAD_COLOR_RGB)
    labels = decode_labels(row["thumbnail_labels"]) if row["thumbnail_labels"] else None
    return np.asarray(picture, np.uint8), labels


def _draw_faces(photo: Image, row: Row) -> None:
    scale = photo.shape[1] / row["width"] if row["width"] else 1.0
    line = max(1, round(photo.shape[1] / 256))
    for index, face in enumerate(row["faces"]):
        x1, y1, x2, y2 = (round(value * scale) for value in face["box"])
        chosen = index == row["face"]
        cv2.rectangle(photo, (x1, y1), (x2, y2), _CHOSEN if chosen else _OTHER, line)
        points = zip(face["landmarks"][::2], face["landmarks"][1::2], strict=True)
        for x, y in points if chosen else ():
            cv2.circle(
                photo,
                (round(x * scale), round(y * scale)),
                line + 1 if line > 1 else 0,
                _POINT,
                cv2.FILLED,
            )


def half_blocks(shown: Panes) -> Text:
    """Two rows of pixels in each line: the upper in the letter's colour, the lower behind it."""
    joined = np.concatenate(
        [np.pad(pane, ((0, pane.shape[0] % 2), (0, 0), (0, 0))) for pane in shown], axis=1
    )
    edges = set(np.cumsum([pane.shape[1] for pane in shown])[:-1].tolist())
    text = Text(no_wrap=True, end="")
    for top, bottom in zip(joined[::2].tolist(), joined[1::2].tolist(), strict=True):
        for column, (upper, lower) in enumerate(zip(top, bottom, strict=True)):
            if column in edges:
                text.append(" ")
            text.append("▀", Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower)))
        text.append("\n")
    return text


def write_sheet(found: Inspection, path: Path, overwrite: bool) -> None:
    """Write `sheet` as a PNG. Raises PipelineError where there is no picture, or `path` can't be
    written.
    """
    if found.taken_down:
        raise PipelineError(f"{found.row['key']} was taken down: there is no picture.")
    image = sheet(found)
    if image is None:
        raise PipelineError(
            f"of {found.row['key']} there is no picture: {found.row['reason']}. Leave out --png."
        )
    try:
        with path.open("wb" if overwrite else "xb") as stream:
            image.save(stream, "PNG")
    except FileExistsError:
        raise PipelineError(
            f"{path} is there already. Give --overwrite to replace it, or another name."
        ) from None
    except OSError as error:
        raise PipelineError(f"{path} can't be written: {error.strerror}.") from error


def sheet(found: Inspection) -> PILImage.Image | None:
    """Picture, overlay and legend side by side at full size; None where there is no picture."""
    shown = panes(found)
    if not shown:
        return None
    lines = [found.row["key"], found.row["reason"] or found.row["status"]]
    present = [(label, share) for label, share in enumerate(found.row["label_areas"]) if label]
    width, height = sum(pane.shape[1] for pane in shown), shown[0].shape[0]
    tall = max(height, 2 * _MARGIN + _LINE * (len(lines) + 1 + len(present)))
    whole = PILImage.new("RGB", (width + _LEGEND, tall), _BACK)
    left = 0
    for pane in shown:
        whole.paste(PILImage.fromarray(pane), (left, 0))
        left += pane.shape[1]
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(15)
    top, left = _MARGIN, left + _MARGIN
    for line in lines:
        pen.text((left, top), line, _INK, font)
        top += _LINE
    top += _LINE // 2
    for label, share in present:
        ink = _INK if share else _FAINT
        if share:
            pen.rectangle((left, top + 2, left + 16, top + 17), PALETTE[label])
        pen.text((left + 26, top), LABELS[label].replace("_", " "), ink, font)
        pen.text((left + 160, top), f"{share:.2%}" if share else "none", ink, font)
        top += _LINE
    return whole
