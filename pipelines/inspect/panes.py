"""Panes: the image of an inspected input and its label map, side by side, as text for a terminal or
as a PNG.

Boxes and landmarks are drawn after the image is resized, so that they are visible at any size. An
input without a sample is shown by its thumbnail.
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
# colours of the main face, other faces, landmarks; of the legend's background and texts
_MAIN_FACE: Final = (0, 255, 90)
_OTHER_FACE: Final = (255, 200, 0)
_LANDMARK: Final = (255, 40, 80)
_BACKGROUND: Final = (24, 26, 30)
_TEXT: Final = (230, 232, 236)
_FAINT: Final = (120, 124, 132)
_OPACITY: Final = 0.55  # of the labels' colours over the image
# of the legend, pixels
_LEGEND_WIDTH: Final = 300
_LINE_HEIGHT: Final = 24
_MARGIN: Final = 14


def panes(inspection: Inspection, width: int = 0) -> Panes:
    """The image with its faces drawn, and, if there is a label map, the image under the colours of
    its labels. RGB, both of one size; an empty list where there is no image.

    width: pixels of each; 0 for the image's own size, which is also the maximum.
    """
    image, labels = _pixels(inspection)
    if image is None:
        return []
    scale = min(1.0, width / image.shape[1]) if width else 1.0
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    image = np.array(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
    shown = [image]
    if labels is not None:
        labels = np.asarray(cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST_EXACT))
        colored = cv2.addWeighted(image, 1 - _OPACITY, COLORS[labels], _OPACITY, 0)
        shown.append(np.where((labels == 0)[:, :, None], image // 2, colored).astype(np.uint8))
    _draw_faces(image, inspection.row)
    return shown


def _pixels(inspection: Inspection) -> tuple[Image | None, LabelMap | None]:
    """Image and label map of the sample, or else of the thumbnail."""
    row, record = inspection.row, inspection.record
    if record is not None:
        return decode_jpeg(record.image), decode_labels(record.parsing)
    if not row["thumbnail"]:
        return None, None
    image = cv2.imdecode(np.frombuffer(row["thumbnail"], np.uint8), cv2.IMREAD_COLOR_RGB)
    labels = decode_labels(row["thumbnail_labels"]) if row["thumbnail_labels"] else None
    return np.asarray(image, np.uint8), labels


def _draw_faces(image: Image, row: Row) -> None:
    """Draws the boxes of all faces, and the landmarks of the main one."""
    scale = image.shape[1] / row["width"] if row["width"] else 1.0
    line = max(1, round(image.shape[1] / 256))
    radius = line + 1 if line > 1 else 0
    for index, face in enumerate(row["faces"]):
        x1, y1, x2, y2 = (round(value * scale) for value in face["box"])
        is_main = index == row["face"]
        cv2.rectangle(image, (x1, y1), (x2, y2), _MAIN_FACE if is_main else _OTHER_FACE, line)
        points = zip(face["landmarks"][::2], face["landmarks"][1::2], strict=True)
        for x, y in points if is_main else ():
            center = round(x * scale), round(y * scale)
            cv2.circle(image, center, radius, _LANDMARK, cv2.FILLED)


def half_blocks(shown: Panes) -> Text:
    """The panes side by side. A line of text shows two rows of pixels: the upper as the colour of
    half blocks, the lower as their background."""
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


def write_sheet(inspection: Inspection, path: Path, overwrite: bool) -> None:
    """Writes `sheet` as a PNG. Raises PipelineError where there is no image, or `path` can't be
    written."""
    key = inspection.row["key"]
    if inspection.taken_down:
        raise PipelineError(f"{key} was taken down, so it has no image. Leave out --png.")
    image = sheet(inspection)
    if image is None:
        reason = inspection.row["reason"]
        raise PipelineError(f"{key} has no image, because of {reason}. Leave out --png.")
    try:
        with path.open("wb" if overwrite else "xb") as stream:
            image.save(stream, "PNG")
    except FileExistsError:
        raise PipelineError(
            f"{path} exists. Give --overwrite to replace it, or another name."
        ) from None
    except OSError as error:
        raise PipelineError(f"{path} can't be written: {error.strerror}.") from error


def sheet(inspection: Inspection) -> PILImage.Image | None:
    """Image, overlay and legend side by side at full size; None where there is no image."""
    shown, row = panes(inspection), inspection.row
    if not shown:
        return None
    lines = [row["key"], row["reason"] or row["status"]]
    areas = [(label, area) for label, area in enumerate(row["label_areas"]) if label]
    width, height = sum(pane.shape[1] for pane in shown), shown[0].shape[0]
    legend_height = 2 * _MARGIN + _LINE_HEIGHT * (len(lines) + 1 + len(areas))
    size = width + _LEGEND_WIDTH, max(height, legend_height)
    result = PILImage.new("RGB", size, _BACKGROUND)
    left = 0
    for pane in shown:
        result.paste(PILImage.fromarray(pane), (left, 0))
        left += pane.shape[1]
    draw, font = ImageDraw.Draw(result), ImageFont.load_default(15)
    top, left = _MARGIN, left + _MARGIN
    for line in lines:
        draw.text((left, top), line, _TEXT, font)
        top += _LINE_HEIGHT
    top += _LINE_HEIGHT // 2
    for label, area in areas:
        color = _TEXT if area else _FAINT
        if area:
            draw.rectangle((left, top + 2, left + 16, top + 17), PALETTE[label])
        draw.text((left + 26, top), LABELS[label].replace("_", " "), color, font)
        draw.text((left + 160, top), f"{area:.2%}" if area else "none", color, font)
        top += _LINE_HEIGHT
    return result
