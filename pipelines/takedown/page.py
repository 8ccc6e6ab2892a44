"""Page: shows the operator what a take-down would remove, as one HTML file that loads nothing else.

It shows faces of people, so it is readable by its owner only, and to be deleted after use. Names
and other text from outside the program are escaped.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import cv2
import numpy as np
from markupsafe import Markup

import pipelines.report
from configs.errors import PipelineError, ShardError
from pipelines.report.page import page_template
from pipelines.takedown.matching import Match, Search
from stages.codec import THUMBNAIL_SIDE, Image, decode_jpeg, encode_jpeg, shrink
from stages.storage import layout
from stages.storage.reader import DatasetReader
from stages.storage.sidecar import Row
from stages.storage.store import Store

MOST_DRAWN: Final = 1000  # matches that the page shows
_FOLDER: Final = Path(__file__).parent
_REPORT: Final = Path(pipelines.report.__file__).parent
_FIRST_LINE: Final = "<!doctype html><!-- consistentid take-down -->\n"
_CROP: Final = 200  # pixels, height of a drawn face
_MARGIN: Final = 0.35  # around a face's box, as a share of its longer side
_QUALITY: Final = 85
_COLUMNS: Final = (
    *(
        "key",
        "source",
        "status",
        "reason",
        "detail",
        "stage",
        "thumbnail",
        "width",
        "height",
        "faces",
    ),
    *("face", "tar_offset", "tar_size", "quarantine_offset", "quarantine_size", "members"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Card:
    """A record on the page. face: the matched face, thumbnail: the whole picture, as data URLs, ""
    where there is no image. box: left, top, width and height of the face in the picture, percent;
    () if no face was matched.
    """

    match: Match
    shard: str
    status: str
    which: str
    face: str
    thumbnail: str
    box: tuple[float, ...]


def write_page(store: Store, search: Search, path: Path, lines: Sequence[str]) -> int:
    """Writes the page of a request. Returns the number of matches that it doesn't show.

    lines: what is printed about threshold and error rates. Matches are sorted by cosine, the most
    alike first. Raises PipelineError if `path` can't be written, or is another file than such a
    page.
    """
    _check_path(path)
    matches = sorted(search.matches, key=lambda match: -(match.cosine or 0))
    drawn = matches[:MOST_DRAWN]
    cards = _cards(store, [*drawn, *search.near])
    html = page_template(_FOLDER).render(
        first_line=Markup(_FIRST_LINE),  # noqa: S704 - a constant
        style=Markup((_REPORT / "page.css").read_text(encoding="utf-8")),  # noqa: S704 - as above
        lines=lines,
        matches=[cards[match.key] for match in drawn],
        total=len(matches),
        shards=len({match.shard for match in matches}),
        left_out=len(matches) - len(drawn),
        near=[cards[match.key] for match in search.near],
        more_near=search.more_near,
        by_photo=search.request is not None,
    )
    _write_private(path, html)
    return len(matches) - len(drawn)


def _check_path(path: Path) -> None:
    """Raises PipelineError if the path is a folder, or a file that isn't such a page."""
    try:
        with path.open("rb") as stream:
            first = stream.read(len(_FIRST_LINE)).decode(errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise PipelineError(f"--page {path} can't be written: {error.strerror}.") from error
    if first != _FIRST_LINE:
        raise PipelineError(f"--page {path} is another file. Give the name of a new one.")


def _write_private(path: Path, html: str) -> None:
    """Writes a file that only its owner can read."""
    try:
        path.unlink(missing_ok=True)  # a link is replaced, not followed
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(html)
    except OSError as error:
        raise PipelineError(f"--page {path} can't be written: {error.strerror}.") from error


def _cards(store: Store, matches: Sequence[Match]) -> dict[str, _Card]:
    """Returns key → card."""
    reader = DatasetReader(store)
    by_shard: dict[int, dict[str, Match]] = {}
    for match in matches:
        by_shard.setdefault(match.shard, {})[match.key] = match
    return {
        card.match.key: card
        for index, by_key in by_shard.items()
        for card in _cards_of_shard(reader, index, by_key)
    }


def _cards_of_shard(
    reader: DatasetReader, index: int, by_key: Mapping[str, Match]
) -> Iterator[_Card]:
    keys = reader.rows(index, ("key",)).column("key").to_pylist()
    places = [place for place, key in enumerate(keys) if key in by_key]
    for row in reader.rows(index, _COLUMNS).take(places).to_pylist():
        match = by_key[row["key"]]
        place = match.face if match.face >= 0 else row["face"]
        face = row["faces"][place] if 0 <= place < len(row["faces"]) else None
        image = _image(reader, index, row)
        crop, box = b"", tuple[float, ...]()
        if image is not None and face is not None and row["width"]:
            crop = encode_jpeg(_crop(image, face["box"], row["width"]), _QUALITY)
            box = _percent(face["box"], row["width"], row["height"])
        thumbnail, kind = row["thumbnail"], "webp"
        if not thumbnail and image is not None:
            thumbnail = encode_jpeg(np.asarray(shrink(image, THUMBNAIL_SIDE)), _QUALITY)
            kind = "jpeg"
        count = len(row["faces"])
        yield _Card(
            match=match,
            shard=layout.shard_name(index),
            status=_status(row),
            which=f"face {place + 1} of {count}" if face is not None and count > 1 else "",
            face=_url(crop, "jpeg"),
            thumbnail=_url(thumbnail, kind),
            box=box,
        )


def _status(row: Row) -> str:
    reason = row["reason"].replace("_", " ")
    return f"{row['status']}: {reason}" if reason else "sample"


def _image(reader: DatasetReader, index: int, row: Row) -> Image | None:
    """Returns the sample's image, or else the thumbnail; None if there is neither, or it is
    damaged: a picture that can't be shown can still be removed.
    """
    try:
        record = reader.sample(index, row)
        if record is not None:
            return decode_jpeg(record.image)
    except (ShardError, ValueError):
        pass
    if not row["thumbnail"]:
        return None
    image = cv2.imdecode(np.frombuffer(row["thumbnail"], np.uint8), cv2.IMREAD_COLOR_RGB)
    return None if image is None else np.asarray(image, np.uint8)


def _crop(image: Image, box: Sequence[float], width: int) -> Image:
    """Returns the face with some margin, _CROP pixels high. width: of the image that `box` is in
    pixels of.
    """
    scale = image.shape[1] / width
    x1, y1, x2, y2 = (value * scale for value in box)
    margin = _MARGIN * max(x2 - x1, y2 - y1)
    left, top = max(0, round(x1 - margin)), max(0, round(y1 - margin))
    part = image[top : max(top + 1, round(y2 + margin)), left : max(left + 1, round(x2 + margin))]
    if not part.size:  # a box outside the image, of a source that brings its own faces
        part = image
    enlarged = _CROP / part.shape[0]
    size = min(2 * _CROP, max(1, round(part.shape[1] * enlarged))), _CROP
    method = cv2.INTER_AREA if enlarged < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(part, size, interpolation=method), np.uint8)


def _percent(box: Sequence[float], width: int, height: int) -> tuple[float, ...]:
    x1, x2 = (min(max(value / width, 0), 1) for value in box[::2])
    y1, y2 = (min(max(value / max(height, 1), 0), 1) for value in box[1::2])
    return tuple(round(100 * value, 2) for value in (x1, y1, x2 - x1, y2 - y1))


def _url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}" if data else ""
