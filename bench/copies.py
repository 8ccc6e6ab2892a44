"""Distances between an image and its near duplicates, and between images of different people.

    python -m bench.copies FOLDER

Every image in FOLDER must show another person (`python -m pipelines.cli synthesize FOLDER --count
1000` makes such a folder). Some are edited as copies on the web are, and all go through the resize,
detect and embed stages. As in the pipeline, the perceptual hash is that of the resized image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cv2
import imagehash
import numpy as np
import numpy.typing as npt
import typer
from PIL import Image as PILImage

from configs.load import load
from configs.schema import DatasetConfig
from stages.backends.weights import Weights
from stages.base import Stage, run_chain
from stages.codec import Image, decode_jpeg, encode_jpeg
from stages.detect import DetectStage
from stages.embed import EmbedStage
from stages.record import FloatArray, Record, key_of
from stages.resize import ResizeStage

Edit = Callable[[Image], bytes]


def _jpeg(quality: int) -> Edit:
    return lambda image: encode_jpeg(image, quality)


def _scaled(factor: float, quality: int) -> Edit:
    return lambda image: encode_jpeg(
        cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA), quality
    )


def _cropped(left: float, top: float, right: float, bottom: float) -> Edit:
    """Returns an edit that removes these shares of the width and the height."""

    def edit(image: Image) -> bytes:
        height, width = image.shape[:2]
        rows = slice(round(top * height), height - round(bottom * height))
        return encode_jpeg(
            np.ascontiguousarray(image[rows, round(left * width) : width - round(right * width)]),
            90,
        )

    return edit


EDITS: dict[str, Edit] = {
    "JPEG, quality 75": _jpeg(75),
    "JPEG, quality 40": _jpeg(40),
    "3/4 size": _scaled(0.75, 90),
    "half size, quality 60": _scaled(0.5, 60),
    "brightened by a fifth": lambda image: encode_jpeg(cv2.convertScaleAbs(image, alpha=1.2), 90),
    "blurred, sigma 2": lambda image: encode_jpeg(cv2.GaussianBlur(image, (0, 0), 2), 90),
    "cropped, 1 % on all sides": _cropped(0.01, 0.01, 0.01, 0.01),
    "cropped, 2.5 % on all sides": _cropped(0.025, 0.025, 0.025, 0.025),
    "cropped, 5 % left and top": _cropped(0.05, 0.05, 0, 0),
    "mirrored": lambda image: encode_jpeg(np.ascontiguousarray(image[:, ::-1]), 90),
}


@dataclass(frozen=True, slots=True)
class Features:
    """Features of N images. hashes: (N, 32) uint8. identities: (N, 512), zero without a face."""

    hashes: npt.NDArray[np.uint8]
    identities: FloatArray


def features_of(images: list[bytes], stages: list[Stage], embed: bool) -> Features:
    """Returns the hashes of the resized images and, with `embed`, the identities of their faces."""
    records = [
        Record(key=key_of(str(i)), source=str(i), image=data) for i, data in enumerate(images)
    ]
    resized = run_chain(stages[:1], records)
    hashes = np.stack([perceptual_hash(decode_jpeg(record.image)) for record in resized])
    identities = np.zeros((len(images), 512), np.float32)
    for row, record in enumerate(run_chain(stages[1:], resized) if embed else []):
        if record.identity is not None:
            identities[row] = record.identity
    return Features(hashes, identities)


def perceptual_hash(image: Image) -> npt.NDArray[np.uint8]:
    """Returns the 256 bits of an image's perceptual hash, (32,)."""
    return np.packbits(imagehash.phash(PILImage.fromarray(image), hash_size=16).hash.ravel())


def distances(left: npt.NDArray[np.uint8], right: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Returns the number of bits in which hashes (…, 32) differ."""
    return np.asarray(np.bitwise_count(left ^ right).sum(-1, dtype=np.int64))


def pairwise(features: Features) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Returns the hash distances and the cosines of all pairs of images."""
    hashes = features.hashes
    bits = [distances(hashes[i], hashes[i + 1 :]) for i in range(len(hashes))]
    identities = features.identities[np.any(features.identities, axis=1)]
    cosines = (identities @ identities.T)[np.triu_indices(len(identities), 1)]
    return np.concatenate(bits), cosines


def main(
    folder: Annotated[Path, typer.Argument(help="Images of different people.")],
    count: Annotated[int, typer.Option(min=2, help="Images to embed; all are hashed.")] = 300,
    edited: Annotated[int, typer.Option(min=1, help="Images to edit.")] = 150,
    save: Annotated[
        Path | None, typer.Option(help="Write the identities to this .npy file.")
    ] = None,
    config: Annotated[Path, typer.Option(help="Preset of the data set.")] = Path(
        "configs/dataset/demo.yaml"
    ),
) -> None:
    """Print distances and cosines between different people, and of copies by edit."""
    settings = load(DatasetConfig, config)
    weights = Weights(settings.weights)
    stages: list[Stage] = [
        ResizeStage(settings.resize),
        DetectStage(settings.detect, weights),
        EmbedStage(settings.embed, weights),
    ]
    for stage in stages:
        stage.setup()
    names = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png")
    )
    embedded = features_of([path.read_bytes() for path in names[:count]], stages, embed=True)
    everyone = embedded
    if names[count:]:
        hashed = features_of([path.read_bytes() for path in names[count:]], stages, embed=False)
        hashes = np.concatenate([embedded.hashes, hashed.hashes])
        everyone = Features(hashes, embedded.identities)
    if save is not None:
        np.save(save, embedded.identities)
    bits, cosines = pairwise(everyone)
    print(
        f"different people: {len(bits):,} pairs by hash, bits: "
        + _quantiles(bits, "{:.0f}", (0, 0.0001, 0.001, 0.01, 0.5))
    )
    print(
        f"different people: {len(cosines):,} pairs by face, cosine: "
        + _quantiles(cosines, "{:.3f}", (0.5, 0.99, 0.999, 1))
    )
    originals = [decode_jpeg(path.read_bytes()) for path in names[:edited]]
    print(
        f"copies of {len(originals)}; of hashes: median, 95 %, largest; of cosines: median, 5 %, "
        "smallest; number without a face"
    )
    for name, edit in EDITS.items():
        copies = features_of([edit(image) for image in originals], stages, embed=True)
        bits = distances(copies.hashes, embedded.hashes[: len(originals)])
        cosines = np.einsum("nd,nd->n", copies.identities, embedded.identities[: len(originals)])
        cosines = cosines[np.any(copies.identities, axis=1)]
        by_hash = _quantiles(bits, "{:.0f}", (0.5, 0.95, 1))
        by_face = _quantiles(cosines, "{:.3f}", (0.5, 0.05, 0))
        print(f"{name:<28} {by_hash}   {by_face}   {len(bits) - len(cosines)}", flush=True)


def _quantiles(
    values: npt.NDArray[np.int64] | FloatArray, template: str, quantiles: tuple[float, ...]
) -> str:
    return " ".join(template.format(value) for value in np.quantile(values, quantiles))


if __name__ == "__main__":
    typer.run(main)
