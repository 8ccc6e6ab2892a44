"""Faces: the stored embeddings of all faces of a shard's samples, and their cosines to others."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dedup.hashes import Ints
from pipelines.dedup.nearest import Floats
from stages.record import IDENTITY_DIM

# of a sidecar: what `faces_of` reads
FACE_COLUMNS: Final = ("face", "identity", "other_identities")


class Faces(NamedTuple):
    """The F faces with an embedding, main faces first.

    row: (F,) rows of the table. face: (F,) their places in the record's `faces`. vectors: (F, 512)
    float32, unit norm.
    """

    row: Ints
    face: Ints
    vectors: Floats


class Best(NamedTuple):
    """For each of N rows, its face that is most like one of the queries.

    cosine: (N,) float32, -1 where the row has no embedding. face: (N,) its place in `faces`, -1
    where there is none.
    """

    cosine: Floats
    face: Ints


def faces_of(table: pa.Table) -> Faces:
    """Returns the faces of a sidecar's rows, which must have FACE_COLUMNS. Faces for which the
    network gave no usable vector are left out.
    """
    main = table.column("face").to_numpy()
    has_main = table.column("identity").is_valid().to_numpy()
    counts = _lengths(table.column("other_identities")) // IDENTITY_DIM
    rows = np.arange(len(table))
    others = np.repeat(rows, counts)
    place = np.arange(len(others)) - np.repeat(np.cumsum(counts) - counts, counts)
    place += place >= main[others]  # `faces` has the main one between them
    vectors = np.concatenate([_vectors(table, name) for name in FACE_COLUMNS[1:]])
    row = np.concatenate([rows[has_main], others])
    face = np.concatenate([main[has_main], place])
    usable = vectors.any(axis=1)
    return Faces(row[usable], face[usable], vectors[usable])


def best_of(faces: Faces, queries: Floats, rows: int) -> Best:
    """Returns the face of each of `rows` rows that is most like any of `queries` (Q, 512)."""
    best = Best(np.full(rows, -1, np.float32), np.full(rows, -1, np.int64))
    if len(faces.row):
        # not a matrix product: a cosine depends on its two vectors alone
        cosines = np.max([np.einsum("fd,d->f", faces.vectors, each) for each in queries], axis=0)
        order = np.argsort(cosines, kind="stable")  # the largest of a row is written last
        best.cosine[faces.row[order]] = cosines[order]
        best.face[faces.row[order]] = faces.face[order]
    return best


def _lengths(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    lengths = pc.fill_null(pc.list_value_length(column), 0)
    return np.asarray(lengths.to_numpy(), np.int64)


def _vectors(table: pa.Table, name: str) -> Floats:
    """Returns (F, 512) float32, of all rows in which the column isn't null."""
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table.column(name).chunks]
    flat = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return np.asarray(flat, np.float32).reshape(-1, IDENTITY_DIM)
