"""Blocked people: samples that show a person whose request asked that no later picture is used."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.dedup.faces import best_of, faces_of
from stages.storage.exclusions import BLOCKED, BlockedPerson

logger = logging.getLogger(__name__)


def embedder_of(signatures: Sequence[str]) -> str:
    """Returns the signature of the stage `embed`; "" if there is none."""
    return next((each for each in signatures if each.rsplit("-", 2)[0] == "embed"), "")


def comparable(people: Sequence[BlockedPerson], embedder: str) -> list[BlockedPerson]:
    """Returns the blocked people whose embeddings are of `embedder`. Logs a warning if there are
    others.
    """
    same = [person for person in people if person.embedder == embedder]
    if others := len(people) - len(same):
        logger.warning(
            "%d blocked people were embedded by another embedder than this data set's faces (%s), "
            "so they are not recognised. Give their photographs to `takedown --photo "
            "--block-person` again.",
            others,
            embedder,
        )
    return same


def blocked_rows(table: pa.Table, people: Sequence[BlockedPerson]) -> Iterator[dict[str, Any]]:
    """Yields key, value (the cosine) and detail of each row in which a face matches a blocked
    person.

    table: rows of a sidecar, with key, sha256 and FACE_COLUMNS.
    """
    if not people or not len(table):
        return
    faces = faces_of(table)
    digests, keys = table.column("sha256").to_pylist(), table.column("key").to_pylist()
    cosine = np.full(len(table), -1, np.float32)
    face = np.full(len(table), -1, np.int64)
    for person in people:
        best = best_of(faces, person.vectors, len(table))
        matches = (best.cosine >= person.cosine) & (best.cosine > cosine)
        for row in np.flatnonzero(matches).tolist():
            if digests[row] not in person.released:
                cosine[row], face[row] = best.cosine[row], best.face[row]
    main = table.column("face").to_numpy()
    for row in np.flatnonzero(face >= 0).tolist():
        which = "" if face[row] == main[row] else f", face {face[row] + 1}"
        yield {
            "key": keys[row],
            "reason": BLOCKED,
            "of": "",
            "value": float(cosine[row]),
            "detail": f"cosine {cosine[row]:.4f} to a blocked person{which}",
        }
