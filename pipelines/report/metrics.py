"""Figures: what is measured of every written sample, one number each, and how the page calls it.

To add one, add a row to FIGURES; if its number is not a sidecar column of the same name, `matrix`
says where it is from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.report.distribution import Floats
from stages.regions import LABEL_IDS, LABELS, REGION_LABELS, REGION_WORDS


@dataclass(frozen=True, slots=True)
class Figure:
    """scale: the page shows values times this, as in shares of a picture in percent. whole: whole
    numbers.
    """

    name: str
    title: str
    unit: str = ""
    note: str = ""
    scale: float = 1
    whole: bool = False
    group: str = "picture"


FIGURES: Final = (
    Figure("score", "Detection score", note="of the chosen face"),
    Figure("face_count", "Faces per image", note="all faces found", whole=True),
    Figure("face_side", "Face size", "px", "short side of the box"),
    Figure("source_side", "Source size", "px", "short side, before resizing", whole=True),
    Figure("sharpness", "Sharpness", note="of the chosen face"),
    Figure("brightness", "Brightness", note="of the face's skin, 0 to 1"),
    Figure("clipped", "Clipped", "%", "of the face, black or white", 100),
    Figure("occlusion", "Occlusion", "%", "of the face, hidden by something", 100),
    Figure("yaw", "Yaw", "°", "over 0: to the viewer's right", group="pose"),
    Figure("pitch", "Pitch", "°", "nodding", group="pose"),
    Figure("roll", "Roll", "°", "tilted", group="pose"),
    Figure(
        "identity_norm", "Embedding norm", note="before it is made unit length", group="identity"
    ),
    Figure("caption_tokens", "Caption", "tokens", "coarse description", whole=True, group="text"),
    Figure(
        "face_caption_tokens",
        "Face caption",
        "tokens",
        "fine description",
        whole=True,
        group="text",
    ),
    Figure(
        "text_tokens",
        "Training text",
        "tokens",
        "as the trainer makes it",
        whole=True,
        group="text",
    ),
    Figure("cut", "Share cut", "%", "of the captions, in training", 100, group="text"),
    *(
        Figure(f"area_{w}", w, "%", "of the picture, where visible", 100, group="area")
        for w in REGION_WORDS
    ),
    *(
        Figure(f"words_{w}", w, "words", "of its clause", whole=True, group="words")
        for w in REGION_WORDS
    ),
)
COLUMNS: Final = [  # of the sidecar, for these
    *(
        "score",
        "face_count",
        "face_side",
        "source_width",
        "source_height",
        "sharpness",
        "brightness",
        "clipped",
    ),
    *(
        "occlusion",
        "yaw",
        "pitch",
        "roll",
        "identity_norm",
        "caption_tokens",
        "face_caption_tokens",
        "text_tokens",
    ),
    *("cut", "label_areas", "region_words"),
]


def matrix(table: pa.Table) -> Floats:
    """(len(FIGURES), rows) of a table with COLUMNS; NaN where a row has no such number, or a region
    no pixel.
    """
    areas = regions(label_matrix(table))
    areas[areas == 0] = np.nan
    words = _lists(table["region_words"], len(REGION_WORDS))
    special = {
        "source_side": np.minimum(
            _numbers(table["source_width"]), _numbers(table["source_height"])
        ),
        **{f"area_{word}": area for word, area in zip(REGION_WORDS, areas, strict=True)},
        **{f"words_{word}": count for word, count in zip(REGION_WORDS, words, strict=True)},
    }
    rows = [special[f.name] if f.name in special else _numbers(table[f.name]) for f in FIGURES]
    return np.stack(rows)


def label_matrix(table: pa.Table) -> Floats:
    """Share of each label (19, rows); a column of NaN where there is no label map."""
    return _lists(table["label_areas"], len(LABELS))


def regions(labels: Floats) -> Floats:
    """Share of each region (5, rows), from that of the labels (19, rows). The labels are added in
    their order.
    """
    return np.stack(
        [sum_of(labels, [LABEL_IDS[name] for name in REGION_LABELS[word]]) for word in REGION_WORDS]
    )


def sum_of(labels: Floats, ids: list[int]) -> Floats:
    total = np.zeros(labels.shape[1])
    for label in ids:
        total = total + labels[label]
    return total


def _numbers(column: pa.ChunkedArray) -> Floats:
    values: Floats = pc.cast(column, pa.float64()).to_numpy()  # of a null: NaN
    return values


def _lists(column: pa.ChunkedArray, size: int) -> Floats:
    """Lists of `size` numbers or none → (size, rows), NaN for none."""
    lengths: npt.NDArray[np.int64] = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    if not set(np.unique(lengths)) <= {0, size}:
        raise ValueError(
            f"lists of {sorted(set(lengths.tolist()))} numbers, expected {size} or none"
        )
    out = np.full((size, len(lengths)), np.nan)
    flat = pc.cast(pc.list_flatten(column), pa.float64()).to_numpy()
    out[:, lengths == size] = flat.reshape(-1, size).T
    return out
