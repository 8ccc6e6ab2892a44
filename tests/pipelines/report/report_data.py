"""Data sets for the report's tests: sidecars, manifests, identities and takedowns of any size, from
a seed.

The files have the schemas that the pipeline writes; the pictures in them are crops of one
photograph, tinted so that no two are equal. There are no tars: the report reads none.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
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

# status, stage, reason, its share, and how far the record came: 0 nothing, 1 a picture, 2 measured,
# 3 captioned
_ENDS = (
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
    """What to make. odd: shards that differ from the others (darker, blurred). hostile: words that
    would be markup.
    """

    shards: int = 3
    rows: int = 60
    seed: int = 0
    odd: tuple[int, ...] = ()
    hostile: bool = False
    dim: int = 8  # of the identity: 512 where its weight on the disk matters
    variants: int = 64  # different thumbnails
    # square portraits, aligned as FFHQ's are
    pictures: Sequence[np.ndarray] = field(default_factory=tuple)


def write_set(folder: Path, recipe: Recipe) -> Path:
    """A whole output folder, ready for the report."""
    rng = np.random.default_rng(recipe.seed)
    thumbnails = _thumbnails(recipe.pictures or (_astronaut(),), recipe.variants, rng)
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
    n, odd = recipe.rows, index in recipe.odd
    ends = rng.choice(
        len(_ENDS), n, p=[end[3] for end in _ENDS] / np.sum([end[3] for end in _ENDS])
    )
    ends[: min(n, len(_ENDS))] = np.arange(len(_ENDS))[:n] if index == 0 else 0
    far = np.asarray([end[4] for end in _ENDS])[ends]
    ok = ends == 0
    sources = [f"people/{index:04d}/portrait-{row:05d}.jpg" for row in range(n)]
    chosen = rng.integers(len(pool), size=n)
    faces = np.where(far >= 2, rng.choice([1, 2, 3], n, p=[0.8, 0.15, 0.05]), 0)
    sides = rng.gamma(9, 24, n) + 48
    scores = rng.beta(18, 3, n)
    areas = _areas(n, rng)
    measures = {
        "sharpness": rng.gamma(4, 0.12 if not odd else 0.03, n), "brightness": rng.beta(12, 12 if not odd else 30, n),
        "clipped": rng.beta(1, 40, n), "yaw": rng.normal(0, 16, n), "pitch": rng.normal(0, 9, n),
        "roll": rng.normal(0, 7, n), "occlusion": rng.beta(1, 14, n),
    }  # fmt: skip
    captions = [_caption(rng) for _ in range(n)]
    tokens = rng.integers(14, 60, (2, n))
    cut = np.maximum(0, tokens.sum(0) - 75) / tokens.sum(0)
    fused = rng.random((n, 5)) < 0.8
    columns: dict[str, Any] = {
        "key": [key_of(source) for source in sources], "source": sources,
        **{name: [_ENDS[end][i] for end in ends] for i, name in enumerate(("status", "stage", "reason"))},
        "detail": [f"measured {value:.3f}" if value > 0.5 else "" for value in rng.random(n)],
        "sha256": [key_of(source) * 3 + "abcd" for source in sources],
        "tar_offset": np.where(ok, np.arange(n) * 51200, -1), "tar_size": np.where(ok, 51200, 0),
        "quarantine_offset": np.full(n, -1), "quarantine_size": np.zeros(n, int), "members": [[]] * n,
        "license": rng.choice(_LICENSES, n).tolist(), "author": [f"A. Uthor {v}" for v in rng.integers(0, 40, n)],
        "consent": rng.choice(["", "given"], n).tolist(),
        "width": np.where(far >= 1, 512, 0), "height": np.where(far >= 1, 512, 0),
        "source_width": np.where(far >= 1, rng.integers(512, 4000, n), 0),
        "source_height": np.where(far >= 1, rng.integers(512, 4000, n), 0),
        "faces": [_faces(*given, rng) for given in zip(faces, sides, scores, strict=True)],
        "face": np.where(faces > 0, 0, -1), "face_count": faces,
        "score": pa.array(scores, pa.float64(), mask=far < 2), "face_side": pa.array(sides, pa.float64(), mask=far < 2),
        "label_areas": [list(row) if f >= 2 else [] for row, f in zip(areas, far, strict=True)],
        **{name: pa.array(values.astype(np.float32), mask=far < 2) for name, values in measures.items()},
        "hash": [f"{v:064x}" if f >= 2 else "" for v, f in zip(rng.integers(1 << 62, size=n), far, strict=True)],
        "identity": _vectors(n, recipe.dim, far < 2, rng),
        "identity_norm": pa.array(rng.normal(21, 3, n).astype(np.float32), mask=far < 2),
        "caption": [pair[0] if f == 3 else "" for pair, f in zip(captions, far, strict=True)],
        "face_caption": [pair[1] if f == 3 else "" for pair, f in zip(captions, far, strict=True)],
        "caption_tokens": pa.array(tokens[0], pa.int32(), mask=far < 3),
        "face_caption_tokens": pa.array(tokens[1], pa.int32(), mask=far < 3),
        "text_tokens": pa.array(np.minimum(75, tokens.sum(0)), pa.int32(), mask=far < 3),
        "cut": pa.array(cut.astype(np.float32), mask=far < 3),
        "trainable": pa.array(fused.any(1), mask=far < 3),
        "regions": [_statuses(row, rng) if f == 3 else None for row, f in zip(fused, far, strict=True)],
        "region_words": [list(row) if f == 3 else None for row, f in zip(rng.integers(0, 14, (n, 5)), far, strict=True)],
        "thumbnail": [pool[i][0] if f else b"" for i, f in zip(chosen, far, strict=True)],
        "thumbnail_labels": [pool[i][1] if f >= 2 else b"" for i, f in zip(chosen, far, strict=True)],
    }  # fmt: skip
    if recipe.hostile:
        _spoil(columns, np.flatnonzero(ok), np.flatnonzero(far == 0))
    known = sidecar_columns(ANNOTATIONS)
    return pa.table({column.name: pa.array(columns[column.name], column.type) for column in known})


def _spoil(columns: dict[str, Any], ok: np.ndarray, lost: np.ndarray) -> None:
    """Words that would be markup, everywhere a stranger's words may stand."""
    texts = (("caption", EVIL), ("face_caption", EVIL_IMAGE), ("author", EVIL_MORE))
    for row in ok[:4]:
        for name, word in texts:
            columns[name][row] = word
    for name, word in (("license", EVIL), ("consent", EVIL_IMAGE), ("source", EVIL)):
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
    def one(*words: str) -> str:
        return words[int(rng.integers(len(words)))]

    who = one("woman", "man", "young woman", "young man", "person")
    coarse = (
        f"A {who} with {one('brown', 'black', 'blond', 'grey', 'red')} hair, "
        f"{one('smiling', 'serious', 'calm')}"
    )
    coarse += f", {one('outdoors', 'in a room', 'before a wall', 'in the street')}, number {rng.integers(1_000_000)}."
    face = (
        f"The face is {one('oval', 'round', 'narrow')}; the eyes are "
        f"{one('brown', 'blue', 'green')} and "
    )
    face += f"{one('wide', 'narrow', 'tired')}; the nose is {one('straight', 'broad', 'small')}; the ears are "
    return (
        coarse,
        f"{face}{one('covered', 'small', 'large')}; the mouth is {one('closed', 'open', 'full')}.",
    )


def _identities(written: Sequence[tuple[str, int]], rng: np.random.Generator) -> pa.Table:
    """Groups of 1 to 12 samples in order; the nearest are of the same group first."""
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


# ------------------------------------------------------------------------------------------------ t


@lru_cache(maxsize=1)
def _astronaut() -> np.ndarray:
    """Cut so that the face lies where FFHQ's portraits have it."""
    return np.asarray(Image.fromarray(skimage.data.astronaut()[22:212, 130:320]).resize((256, 256)))


@lru_cache(maxsize=1)
def _label_map() -> Image.Image:
    """256 × 256, drawn: where FFHQ's alignment puts the parts of a face."""
    image = Image.new("L", (256, 256), 0)
    draw = ImageDraw.Draw(image)
    for name, box in (
        ("hair", (46, 16, 210, 180)), ("cloth", (20, 224, 236, 290)), ("neck", (92, 190, 164, 240)),
        ("left_ear", (52, 116, 72, 164)), ("right_ear", (184, 116, 204, 164)), ("skin", (62, 58, 194, 230)),
        ("left_brow", (78, 96, 118, 106)), ("right_brow", (138, 96, 178, 106)), ("left_eye", (84, 112, 114, 128)),
        ("right_eye", (142, 112, 172, 128)), ("nose", (112, 126, 144, 166)), ("upper_lip", (98, 178, 158, 192)),
        ("lower_lip", (98, 190, 158, 206)), ("mouth", (104, 186, 152, 196)),
    ):  # fmt: skip
        draw.ellipse(box, fill=LABEL_IDS[name])
    return image


def _thumbnails(
    pictures: Sequence[np.ndarray], count: int, rng: np.random.Generator
) -> list[tuple[bytes, bytes]]:
    """(WebP, label PNG) of `count` crops, no two alike."""
    return [_thumbnail(pictures[index % len(pictures)], rng) for index in range(count)]


def _thumbnail(picture: np.ndarray, rng: np.random.Generator) -> tuple[bytes, bytes]:
    left, top, right, bottom = rng.uniform(0, 0.12, 4)
    box = (left, top, 1 - right, 1 - bottom)
    width, height = box[2] - box[0], box[3] - box[1]
    size = tuple(max(1, round(96 * side / max(width, height))) for side in (width, height))
    tint = np.clip(picture * rng.uniform(0.75, 1.15, 3), 0, 255).astype(np.uint8)
    photo, labels = Image.fromarray(tint), _label_map()
    photo = photo.resize(size, Image.Resampling.BOX, [v * photo.width for v in box])
    labels = labels.resize(size, Image.Resampling.NEAREST, [v * labels.width for v in box])
    return _encoded(photo, "WEBP", quality=70, method=4), _encoded(labels, "PNG", optimize=True)


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    with io.BytesIO() as out:
        image.save(out, kind, **options)
        return out.getvalue()
