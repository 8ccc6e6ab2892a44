"""Which records a removal request means: by name, by digest, or by photographs of a person."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import PipelineError, ShardError
from configs.schema import DatasetConfig
from pipelines.dedup.blocked import embedder_of
from pipelines.dedup.faces import FACE_COLUMNS, Best, best_of, faces_of
from pipelines.takedown.photos import embed_photos
from stages.backends.same_person import same_person
from stages.record import FloatArray, key_of
from stages.storage import exclusions, layout
from stages.storage.exclusions import TAKEN_DOWN
from stages.storage.reader import DatasetReader
from stages.storage.store import Store

NEAR: Final = 0.10  # faces whose cosine is less than this below the threshold are near misses
MOST_NEAR: Final = 200  # near misses that are returned


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A record to remove. why: how it was matched, for the user who confirms; it is not stored.

    cosine, face: of a request by photograph, the record's face that is most like the person, as its
    place in `faces`; None and -1 if no embedding is stored, or the request isn't by photograph.
    """

    shard: int
    key: str
    source: str
    sha256: str
    why: str
    cosine: float | None = None
    face: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class PhotoRequest:
    """Photographs of a person. vectors: float32 (Q, 512), of each photograph's largest face.
    cosine: a face matches from this on. embedder: signature of the stage `embed` that made the
    vectors. weights: their name in the table of weights.
    """

    vectors: FloatArray
    cosine: float
    embedder: str = ""
    weights: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What a request matches.

    near: records that were just not matched, the most alike first, at most MOST_NEAR; more_near:
    the number of further ones. faces: number of faces that were compared. not_compared: number of
    records that show a face, but have no embedding, since they failed or were dropped before they
    were embedded. foreign: number of records whose embedding came with the source.
    """

    matches: list[Match]
    near: list[Match] = field(default_factory=list)
    more_near: int = 0
    faces: int = 0
    not_compared: int = 0
    foreign: int = 0
    request: PhotoRequest | None = None


def by_source(store: Store, pattern: str) -> list[Match]:
    """Returns the records whose source is `pattern` or matches it; * and ? are wildcards."""

    def why(row: Mapping[str, Any]) -> str:
        matches = row["source"] == pattern or fnmatchcase(row["source"], pattern)
        return pattern if matches else ""

    return _with_duplicates(store, why)


def by_hash(store: Store, sha256: str) -> list[Match]:
    """Returns the records of the image file with this digest."""
    return _with_duplicates(store, lambda row: "digest" if row["sha256"] == sha256 else "")


def by_photo(
    store: Store, config: DatasetConfig, photos: Sequence[Path], cosine: float = 0.0
) -> Search:
    """Returns the records of the person in these photographs: see `by_face`.

    photos: the largest face of each is the person's. cosine: from which a face matches; 0: the
    embedder's threshold. Raises SourceError for a missing photograph, FaceError for one without a
    usable face, and what `by_face` raises.
    """
    embedded = embed_photos(config, photos)
    request = PhotoRequest(
        vectors=embedded.vectors,
        cosine=cosine or same_person(config.embed.weights).cosine,
        embedder=embedded.embedder,
        weights=config.embed.weights,
    )
    return by_face(store, request)


def by_face(store: Store, request: PhotoRequest) -> Search:
    """Returns the records in which a face, the main one or another, has at least the request's
    cosine to one of its photographs; the other records of the identities of matched main faces; and
    the duplicates of all these.

    Raises ShardError if the shards don't have the embeddings of all their faces, or have those of
    another embedder.
    """
    reader = DatasetReader(store)
    best, numbers = _compare(reader, request)
    identities = reader.identities(["key", "identity_id"]).to_pylist()
    identity_ids = {row["key"]: row["identity_id"] for row in identities}
    matched_ids = set[str]()
    for index, (cosines, main) in best.items():
        places = np.flatnonzero(cosines >= request.cosine)
        rows = reader.rows(index, ("key", "face")).take(places).to_pylist() if len(places) else []
        for at, row in zip(places.tolist(), rows, strict=True):
            if main[at] == row["face"] and row["key"] in identity_ids:
                matched_ids.add(identity_ids[row["key"]])

    def why(row: Mapping[str, Any]) -> str:
        cosine, face = best[row["shard"]].cosine[row["at"]], best[row["shard"]].face[row["at"]]
        if cosine >= request.cosine:
            which = "" if face == row["face"] else f", face {face + 1} of {row['face_count']}"
            return f"cosine {cosine:.3f}{which}"
        if identity_ids.get(row["key"]) in matched_ids:
            return f"identity {identity_ids[row['key']]}, cosine {cosine:.3f}"
        return ""

    matches = _with_duplicates(store, why, best)
    near, more_near = _near(reader, request, best, {match.key for match in matches})
    return Search(
        matches=matches,
        near=near,
        more_near=more_near,
        faces=numbers["faces"],
        not_compared=numbers["not_compared"],
        foreign=numbers["foreign"],
        request=request,
    )


def _compare(reader: DatasetReader, request: PhotoRequest) -> tuple[dict[int, Best], Counter[str]]:
    """Returns shard → the best face of each row, and the numbers of `Search`."""
    best: dict[int, Best] = {}
    numbers = Counter[str]()
    for index, manifest in reader.manifests().items():
        if request.embedder and embedder_of(manifest.signatures) != request.embedder:
            numbers["other_embedder"] += 1
            continue
        table = reader.rows(index, (*FACE_COLUMNS, "face_count", "identity_norm"))
        counts, has_identity = table.column("face_count"), pc.is_valid(table.column("identity"))
        without_others = pc.is_null(table.column("other_identities"))
        several = pc.and_(pc.greater(counts, 1), has_identity)
        norm = table.column("identity_norm")
        faces = faces_of(table)
        numbers["faces"] += len(faces.row)
        numbers["not_compared"] += _count(pc.greater(counts, 0), pc.invert(has_identity))
        numbers["incomplete"] += _count(several, without_others)
        numbers["foreign"] += _count(has_identity, pc.is_null(norm))
        best[index] = best_of(faces, request.vectors, len(table))
    what = ""
    if number := numbers["other_embedder"]:
        what = f"{number:,} shards were made with another embedder than this one"
    elif number := numbers["incomplete"]:
        what = f"the other faces of {number:,} pictures with several faces were not embedded"
    if what:
        raise ShardError(
            f"{reader}: {what}, so a request by photograph would miss some. Run `python -m "
            f"pipelines.cli run --config {reader}/{layout.CONFIG} output={reader}` first: it adds "
            "what is missing, from the data set's own samples."
        )
    return best, numbers


def _count(one: pa.ChunkedArray, other: pa.ChunkedArray) -> int:
    """Returns in how many rows both are true."""
    return int(pc.sum(pc.and_(one, other)).as_py() or 0)


def _near(
    reader: DatasetReader, request: PhotoRequest, best: Mapping[int, Best], matched: set[str]
) -> tuple[list[Match], int]:
    """Returns the near misses, and the number of those beyond MOST_NEAR."""
    near = []
    for index, (cosines, faces) in best.items():
        places = np.flatnonzero(cosines >= request.cosine - NEAR).tolist()
        if not places:
            continue
        columns = ("key", "source", "sha256", "face", "face_count", "reason")
        rows = reader.rows(index, columns).take(places).to_pylist()
        for at, row in zip(places, rows, strict=True):
            if row["key"] in matched or row["reason"] == TAKEN_DOWN:
                continue
            cosine, face = float(cosines[at]), int(faces[at])
            which = "" if face == row["face"] else f", face {face + 1} of {row['face_count']}"
            names = ("key", "source", "sha256")
            near.append(
                Match(
                    shard=index,
                    **{name: row[name] for name in names},
                    why=f"cosine {cosine:.3f}{which}",
                    cosine=cosine,
                    face=face,
                )
            )
    near.sort(key=lambda match: -(match.cosine or 0))
    return near[:MOST_NEAR], max(0, len(near) - MOST_NEAR)


def _with_duplicates(
    store: Store, why: Callable[[Mapping[str, Any]], str], best: Mapping[int, Best] | None = None
) -> list[Match]:
    """Returns the records for which `why` returns a text, and the duplicates of these. Records that
    were removed before are left out, also if their removal isn't complete.

    why: is called with columns of the sidecar, `shard`, and the row's place in its sidecar, `at`.
    """
    reader = DatasetReader(store)
    removed = exclusions.removed_keys(store)
    columns = ("key", "source", "sha256", "reason", "face", "face_count")
    rows = [
        {"shard": index, "at": at, **row}
        for index in reader.manifests()
        for at, row in enumerate(reader.rows(index, columns).to_pylist())
        if row["reason"] != TAKEN_DOWN and row["key"] not in removed
    ]
    reasons = {row["key"]: reason for row in rows if (reason := why(row))}
    copies, duplicates = _copies(store), _duplicates(store)
    sha256 = {row["key"]: row["sha256"] for row in rows}
    # an exact copy is not read by a run, so its row has no digest
    sha256 |= {key: sha256.get(of, "") for key, of in copies.items() if not sha256.get(key)}
    count = -1
    while len(reasons) != count:  # copies of copies too
        count = len(reasons)
        digests = {sha256[key] for key in reasons} - {""}
        reasons |= {
            row["key"]: "a copy of one of these"
            for row in rows
            if row["key"] not in reasons
            and (
                copies.get(row["key"]) in reasons
                or duplicates.get(row["key"]) in reasons
                or sha256[row["key"]] in digests
            )
        }
    return [_match(row, reasons[row["key"]], best) for row in rows if row["key"] in reasons]


def _match(row: Mapping[str, Any], why: str, best: Mapping[int, Best] | None) -> Match:
    cosine, face = None, -1
    if best is not None and best[row["shard"]].face[row["at"]] >= 0:
        cosine = float(best[row["shard"]].cosine[row["at"]])
        face = int(best[row["shard"]].face[row["at"]])
    values = {name: row[name] for name in ("shard", "key", "source", "sha256")}
    return Match(**values, why=why, cosine=cosine, face=face)


def _copies(store: Store) -> dict[str, str]:
    """Returns key → key of its original, for the exact copies of the plan."""
    plan = _table(store, layout.PLAN, "duplicate_of")
    copies = plan.filter(pc.not_equal(plan.column("duplicate_of"), ""))
    return {row["key"]: key_of(row["duplicate_of"]) for row in copies.to_pylist()}


def _duplicates(store: Store) -> dict[str, str]:
    """Returns key → key of its original, for what the global pass dropped."""
    # without both tables, the global pass hasn't run yet
    if not store.exists(layout.DUPLICATES) and not store.exists(layout.IDENTITIES):
        return {}
    rows = _table(store, layout.DUPLICATES, "of").to_pylist()
    return {row["key"]: row["of"] for row in rows}


def _table(store: Store, name: str, column: str) -> pa.Table:
    """Raises ShardError if the table is missing or damaged."""
    try:
        return store.table(name, ["key", column])
    except FileNotFoundError as error:
        raise ShardError(
            f"{store.url}/{name} is missing, so copies of the images to remove can't be found. "
            f"{layout.how_to_repair(name)}"
        ) from error


def digest_of(text: str) -> str:
    """Returns `text` if it is a sha256, else the sha256 of the file with this path. Raises
    PipelineError if it is neither.
    """
    if len(text) == 64 and all(letter in "0123456789abcdef" for letter in text.lower()):
        return text.lower()
    if Path(text).is_file():
        with Path(text).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    raise PipelineError(
        f"--hash {text!r}: expected a sha256 (64 hex digits) or the path of a file."
    )
