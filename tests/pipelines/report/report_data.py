"""Synthetic data sets for the tests of the report: sidecars, manifests, identities and take-downs,
of any size, from a seed.

The files have the schemas that the pipeline writes. Thumbnails are crops of one photograph in
different tints. There are no tars, as the report doesn't read them.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import skimage.data
from PIL import Image, ImageDraw

from stages.annotations import ABSENT, FUSED, Measures, Review
from stages.record import key_of
from stages.regions import LABEL_IDS
from stages.storage.manifest import FileEntry, Manifest, RunInfo
from stages.storage.reader import IDENTITIES_SCHEMA
from stages.storage.sidecar import sidecar_columns, write_sidecar

ANNOTATIONS = (Measures, Review)

EVIL = "<script>window.evil = 1; alert(1)</script>"
EVIL_IMAGE = '"><img src=x onerror="window.evil = 2">'
EVIL_MORE = "</script><!-- ]]> {{ 7 * 7 }} \u2028 ' & \\ ${window.evil = 3} \u202e"

# status, stage, reason, its share, and the progress of the record: 0 not read, 1 has an image,
# 2 measured, 3 captioned
_OUTCOMES = (
    ("ok", "", "", 0.8, 3),
    ("dropped", "source", "duplicate", 0.02, 0),
    ("dropped", "rights", "license_not_allowed", 0.01, 0),
    ("dropped", "detect", "no_face", 0.03, 1),
    ("dropped", "quality_filter", "blurred", 0.03, 2),
    ("dropped", "quality_filter", "turned_away", 0.02, 2),
    ("dropped", "quality_filter", "occluded", 0.01, 2),
    ("dropped", "global_pass", "near_duplicate", 0.03, 3),
    ("dropped", "global_pass", "face_duplicate", 0.01, 3),
    ("dropped", "takedown", "taken_down", 0.005, 0),
    ("failed", "resize", "not_an_image", 0.02, 0),
    ("failed", "resize", "truncated", 0.01, 0),
    ("failed", "parse", "killed_worker", 0.005, 1),
)
_LICENSES = ("CC-BY-4.0", "CC0-1.0", "CC-BY-SA-4.0", "")
CHAIN = (
    *("rights", "resize", "thumbnail", "detect", "parse", "embed", "measure", "quality_filter"),
    *("caption", "review"),
)
_STAGES = ("source", "resize", "detect", "parse", "embed", "measure", "caption", "review")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A data set to make. odd: shards that differ from the others (darker, blurred). hostile: with
    texts that would be markup, if they were not escaped.
    """

    shards: int = 3
    rows: int = 60
    seed: int = 0
    odd: tuple[int, ...] = ()
    hostile: bool = False
    dim: int = 8  # numbers of an embedding: 512 where the size of the files matters
    variants: int = 64  # different thumbnails


def write_set(folder: Path, recipe: Recipe) -> Path:
    """A whole output folder, ready for the report."""
    rng = np.random.default_rng(recipe.seed)
    thumbnails = [_thumbnail(rng) for _ in range(recipe.variants)]
    (folder / "shards").mkdir(parents=True)
    written: list[tuple[str, int]] = []
    for index in range(recipe.shards):
        table = _sidecar(index, recipe, thumbnails, rng)
        write_shard(folder, index, table, rng)
        ok = table.filter(pa.compute.equal(table["status"], "ok"))
        written += [(key, index) for key in ok["key"].to_pylist()]
    pq.write_table(_identities(written, rng), folder / "identities.parquet", row_group_size=10_000)
    takedown = {
        "time": "2026-11-20T10:00:00+00:00", "by": "source", "inputs": 2, "shards": ["fgid-000000"],
        "removed": {"fgid-000000": [key_of("gone-1.jpg"), key_of("gone-2.jpg")]}, "sha256": [],
        "note": EVIL if recipe.hostile else "asked by mail",
    }  # fmt: skip
    (folder / "takedown.jsonl").write_text(json.dumps(takedown) + "\n")
    dataset = {
        "source": EVIL_IMAGE if recipe.hostile else "photographs",
        "weights": [
            {
                "name": "scrfd",
                "file": "w.onnx",
                "sha256": "00",
                "license": EVIL if recipe.hostile else "MIT",
            }
        ],
    }
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return folder


def write_shard(folder: Path, index: int, table: pa.Table, rng: np.random.Generator) -> None:
    """Sidecar and manifest of one shard."""
    name = f"fgid-{index:06d}"
    with (folder / "shards" / f"{name}.parquet").open("wb") as stream:
        write_sidecar(table.to_pylist(), ANNOTATIONS, stream)
    ends = zip(table["status"].to_pylist(), table["reason"].to_pylist(), strict=True)
    counts = Counter(ends)
    seconds = {
        stage: round(float(rng.uniform(0.2, 1) * (9 if stage == "parse" else 1)), 4)
        for stage in _STAGES
    }
    manifest = Manifest(
        shard=name,
        inputs=len(table),
        written=counts["ok", ""],
        dropped={reason: n for (status, reason), n in counts.items() if status == "dropped"},
        failed={reason: n for (status, reason), n in counts.items() if status == "failed"},
        inputs_digest="digest",
        signatures=tuple(f"{stage}-1-ab" for stage in CHAIN),
        exclusions="",
        tar=FileEntry(name=f"{name}.tar", bytes=0, sha256=""),
        quarantine=None,
        sidecar=FileEntry(name=f"{name}.parquet", bytes=0, sha256=""),
        run=RunInfo(
            finished=1_790_000_000.0 + 10 * index,
            seconds=round(sum(seconds.values()), 3),
            stage_seconds=seconds,
            executor="inline",
            host="nowhere",
        ),
    )
    (folder / "shards" / f"{name}.json").write_text(manifest.to_json())


def _sidecar(
    index: int, recipe: Recipe, pool: Sequence[tuple[bytes, bytes]], rng: np.random.Generator
) -> pa.Table:
    n = recipe.rows
    shares = np.array([outcome[3] for outcome in _OUTCOMES])
    outcomes = rng.choice(len(_OUTCOMES), n, p=shares / shares.sum())
    # The first shard has every outcome; the first rows of the others are samples.
    outcomes[: min(n, len(_OUTCOMES))] = np.arange(len(_OUTCOMES))[:n] if index == 0 else 0
    progress = np.array([outcome[4] for outcome in _OUTCOMES])[outcomes]
    ok = outcomes == 0
    sources = [f"people/{index:04d}/portrait-{row:05d}.jpg" for row in range(n)]
    offsets, sizes = np.where(ok, np.arange(n) * 51200, -1), np.where(ok, 51200, 0)
    chosen = rng.integers(len(pool), size=n)
    columns: dict[str, Any] = {
        "key": [key_of(source) for source in sources],
        "source": sources,
        **{
            name: [_OUTCOMES[outcome][place] for outcome in outcomes]
            for place, name in enumerate(("status", "stage", "reason"))
        },
        "detail": [f"measured {value:.3f}" if value > 0.5 else "" for value in rng.random(n)],
        "sha256": [key_of(source) * 3 + "abcd" for source in sources],
        "tar_offset": offsets,
        "tar_size": sizes,
        "quarantine_offset": np.full(n, -1),
        "quarantine_size": np.zeros(n, int),
        "members": [[]] * n,
        "sample_sha256": [""] * n,
        "license": rng.choice(_LICENSES, n).tolist(),
        "author": [f"A. Uthor {number}" for number in rng.integers(0, 40, n)],
        "consent": rng.choice(["", "given"], n).tolist(),
        "person": [f"person {row // 4}" if row % 4 else "" for row in range(n)],
        **_faces_and_labels(n, progress, rng),
        **_measures(n, index in recipe.odd, progress >= 2, rng),
        "identity": _vectors(n, recipe.dim, progress < 2, rng),
        "other_identities": [None] * n,
        "identity_norm": _optional(rng.normal(21, 3, n).astype(np.float32), progress >= 2),
        **_texts(n, progress == 3, rng),
        "thumbnail": [pool[at][0] if p else b"" for at, p in zip(chosen, progress, strict=True)],
        "thumbnail_labels": [
            pool[at][1] if p >= 2 else b"" for at, p in zip(chosen, progress, strict=True)
        ],
    }
    if recipe.hostile:
        _spoil(columns, np.flatnonzero(ok), np.flatnonzero(progress == 0))
    every = sidecar_columns(ANNOTATIONS)
    return pa.table({each.name: pa.array(columns[each.name], each.type) for each in every})


def _optional(values: Any, present: np.ndarray) -> list[Any]:
    """The values, None where `present` is False."""
    return [value if p else None for value, p in zip(values, present, strict=True)]


def _faces_and_labels(n: int, progress: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    counts = np.where(progress >= 2, rng.choice([1, 2, 3], n, p=[0.8, 0.15, 0.05]), 0)
    sides, scores = rng.gamma(9, 24, n) + 48, rng.beta(18, 3, n)
    read = progress >= 1
    return {
        "width": np.where(read, 512, 0),
        "height": np.where(read, 512, 0),
        "source_width": np.where(read, rng.integers(512, 4000, n), 0),
        "source_height": np.where(read, rng.integers(512, 4000, n), 0),
        "faces": [_faces(*values, rng) for values in zip(counts, sides, scores, strict=True)],
        "face": np.where(counts > 0, 0, -1),
        "face_count": counts,
        "score": _optional(scores, progress >= 2),
        "face_side": _optional(sides, progress >= 2),
        "label_areas": [areas or [] for areas in _optional(_areas(n, rng).tolist(), progress >= 2)],
    }


def _measures(n: int, odd: bool, present: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    values = {
        "sharpness": rng.gamma(4, 0.03 if odd else 0.12, n),
        "brightness": rng.beta(12, 30 if odd else 12, n),
        "clipped": rng.beta(1, 40, n),
        "yaw": rng.normal(0, 16, n),
        "pitch": rng.normal(0, 9, n),
        "roll": rng.normal(0, 7, n),
        "occlusion": rng.beta(1, 14, n),
    }
    hashes = [f"{value:064x}" for value in rng.integers(1 << 62, size=n)]
    numbers = {name: _optional(row.astype(np.float32), present) for name, row in values.items()}
    return {**numbers, "hash": _optional(hashes, present)}


def _texts(n: int, present: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """Captions, and what the review records of them."""
    captions = [_caption(rng) for _ in range(n)]
    tokens = rng.integers(14, 60, (2, n))
    cut = np.maximum(0, tokens.sum(0) - 75) / tokens.sum(0)
    fused = rng.random((n, 5)) < 0.8
    return {
        "caption": [pair[0] if k else "" for pair, k in zip(captions, present, strict=True)],
        "face_caption": [pair[1] if k else "" for pair, k in zip(captions, present, strict=True)],
        "caption_tokens": _optional(tokens[0], present),
        "face_caption_tokens": _optional(tokens[1], present),
        "text_tokens": _optional(np.minimum(75, tokens.sum(0)), present),
        "cut": _optional(cut.astype(np.float32), present),
        "trainable": _optional(fused.any(1), present),
        "regions": _optional([_statuses(row, rng) for row in fused], present),
        "region_words": _optional(rng.integers(0, 14, (n, 5)).tolist(), present),
    }


def _spoil(columns: dict[str, Any], ok: np.ndarray, lost: np.ndarray) -> None:
    """Puts markup into every column that holds text from outside the program."""
    for name, word in (("caption", EVIL), ("face_caption", EVIL_IMAGE), ("author", EVIL_MORE)):
        for row in ok[:4]:
            columns[name][row] = word
    texts = (("license", EVIL), ("consent", EVIL_IMAGE), ("source", EVIL), ("person", EVIL))
    for name, word in texts:
        columns[name][ok[0]] = word
    for name, word in (("source", EVIL_IMAGE), ("detail", EVIL)):
        columns[name][lost[0]] = word


def _areas(n: int, rng: np.random.Generator) -> np.ndarray:
    """Shares of the 19 labels (n, 19), some of them 0."""
    typical = np.full(19, 0.01)
    typical[[0, 1, 16, 17]] = 0.4, 0.25, 0.12, 0.15
    areas = typical * rng.gamma(6, 1 / 6, (n, 19)) * (rng.random((n, 19)) > 0.15)
    areas[:, 0] = np.maximum(0, 1 - areas[:, 1:].sum(1))
    return areas.astype(np.float32)


def _vectors(n: int, dim: int, missing: np.ndarray, rng: np.random.Generator) -> pa.Array:
    flat = pa.array(rng.standard_normal((n - missing.sum()) * dim).astype(np.float32))
    ends = np.concatenate(([0], np.cumsum(~missing) * dim)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), flat, mask=pa.array(missing))


def _faces(count: int, side: float, score: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    x, y = rng.uniform(0, 512 - side, 2) if side < 512 else (0.0, 0.0)
    return [
        {
            "box": [x + 9 * i, y, x + 9 * i + side, y + 1.2 * side],
            "landmarks": [x, y] * 5,
            "score": score - 0.1 * i,
        }
        for i in range(count)
    ]


def _statuses(fused: np.ndarray, rng: np.random.Generator) -> list[str]:
    """Review.regions: of each region that is not fused, a reason; absent; or nothing."""
    others = ("word_not_in_caption", "caption_too_long", ABSENT, "")
    return [FUSED if is_fused else others[int(rng.integers(4))] for is_fused in fused]


def _caption(rng: np.random.Generator) -> tuple[str, str]:
    """(caption, face caption)."""

    def one(*words: str) -> str:
        return words[int(rng.integers(len(words)))]

    who = one("woman", "man", "young woman", "young man", "person")
    hair = one("brown", "black", "blond", "grey", "red")
    mood = one("smiling", "serious", "calm")
    where = one("outdoors", "in a room", "before a wall", "in the street")
    shape, eyes, lids = (
        one("oval", "round", "narrow"),
        one("brown", "blue", "green"),
        one("wide", "narrow", "tired"),
    )
    nose, ears = one("straight", "broad", "small"), one("covered", "small", "large")
    mouth = one("closed", "open", "full")
    return (
        f"A {who} with {hair} hair, {mood}, {where}, number {rng.integers(1_000_000)}.",
        f"The face is {shape}; the eyes are {eyes} and {lids}; the nose is {nose}; the ears are "
        f"{ears}; the mouth is {mouth}.",
    )


def _identities(written: Sequence[tuple[str, int]], rng: np.random.Generator) -> pa.Table:
    """Identities of 1 to 12 consecutive samples. The nearest samples are first those of the same
    identity, then others."""
    keys = [key for key, _ in written]
    rows: list[dict[str, Any]] = []
    while len(rows) < len(keys):
        first = len(rows)
        group = keys[
            first : first + int(rng.choice([1, 2, 3, 5, 12], p=[0.6, 0.2, 0.1, 0.07, 0.03]))
        ]
        others = keys[max(0, first - 3) : first] + keys[first + len(group) : first + len(group) + 5]
        split = "val" if rng.random() < 0.1 else "train"
        for key in group:
            nearest = [*(other for other in group if other != key), *others][:5]
            alike = np.sort(rng.uniform(0.2, 0.9, len(nearest)))[::-1]
            rows.append(
                {
                    "key": key,
                    "shard": written[len(rows)][1],
                    "identity_id": f"id-{group[0][:12]}",
                    "identity_size": len(group),
                    "split_group": f"group-{group[0][:12]}",
                    "split": split,
                    "nearest": nearest,
                    "similarity": alike.tolist(),
                }
            )
    return pa.Table.from_pylist(rows, schema=IDENTITIES_SCHEMA)


@lru_cache(maxsize=1)
def _astronaut() -> np.ndarray:
    """A crop with the face at the place where FFHQ's portraits have it."""
    return np.asarray(Image.fromarray(skimage.data.astronaut()[22:212, 130:320]).resize((256, 256)))


_PARTS = (
    ("hair", (46, 16, 210, 180)),
    ("cloth", (20, 224, 236, 290)),
    ("neck", (92, 190, 164, 240)),
    ("left_ear", (52, 116, 72, 164)),
    ("right_ear", (184, 116, 204, 164)),
    ("skin", (62, 58, 194, 230)),
    ("left_brow", (78, 96, 118, 106)),
    ("right_brow", (138, 96, 178, 106)),
    ("left_eye", (84, 112, 114, 128)),
    ("right_eye", (142, 112, 172, 128)),
    ("nose", (112, 126, 144, 166)),
    ("upper_lip", (98, 178, 158, 192)),
    ("lower_lip", (98, 190, 158, 206)),
    ("mouth", (104, 186, 152, 196)),
)


@lru_cache(maxsize=1)
def _label_map() -> Image.Image:
    """256 × 256, with the parts of a face drawn where FFHQ's alignment puts them."""
    image = Image.new("L", (256, 256), 0)
    draw = ImageDraw.Draw(image)
    for name, box in _PARTS:
        draw.ellipse(box, fill=LABEL_IDS[name])
    return image


def _thumbnail(rng: np.random.Generator) -> tuple[bytes, bytes]:
    """(WebP image, PNG label map) of a random crop."""
    left, top, right, bottom = rng.uniform(0, 0.12, 4)
    box = (left, top, 1 - right, 1 - bottom)
    width, height = box[2] - box[0], box[3] - box[1]
    size = tuple(max(1, round(96 * side / max(width, height))) for side in (width, height))
    tint = np.clip(_astronaut() * rng.uniform(0.75, 1.15, 3), 0, 255).astype(np.uint8)
    image, labels = Image.fromarray(tint), _label_map()
    image = image.resize(size, Image.Resampling.BOX, [v * image.width for v in box])
    labels = labels.resize(size, Image.Resampling.NEAREST, [v * labels.width for v in box])
    return _encoded(image, "WEBP", quality=70, method=4), _encoded(labels, "PNG", optimize=True)


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    with io.BytesIO() as out:
        image.save(out, kind, **options)
        return out.getvalue()
