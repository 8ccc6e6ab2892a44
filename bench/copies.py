"""How far copies are from their original, and strangers from each other: `python -m bench.copies
FOLDER`.

Every picture of FOLDER must show another person (`python -m pipelines.cli synthesize FOLDER --count
1000` makes such). Some are edited as copies are on the way through the web, and go through the same
resize, detect and embed stages. The perceptual hash is of the resized picture, as in the pipeline.
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


def _scaled(by: float, quality: int) -> Edit:
    return lambda image: encode_jpeg(
        cv2.resize(image, None, fx=by, fy=by, interpolation=cv2.INTER_AREA), quality
    )


def _cut(left: float, top: float, right: float, bottom: float) -> Edit:
    """Without these shares of its sides."""

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
    "cropped, 1 % all round": _cut(0.01, 0.01, 0.01, 0.01),
    "cropped, 2.5 % all round": _cut(0.025, 0.025, 0.025, 0.025),
    "cropped, 5 % left and top": _cut(0.05, 0.05, 0, 0),
    "mirrored": lambda image: encode_jpeg(np.ascontiguousarray(image[:, ::-1]), 90),
}


@dataclass(frozen=True, slots=True)
class Seen:
    """What the pipeline makes of pictures: hashes (N, 32) uint8, identities (N, 512) or zero rows
    where none.
    """

    hashes: npt.NDArray[np.uint8]
    identities: FloatArray


def see(images: list[bytes], stages: list[Stage], embed: bool) -> Seen:
    """The resized pictures' hashes and, with `embed`, the identities of their chosen faces."""
    records = [
        Record(key=key_of(str(i)), source=str(i), image=data) for i, data in enumerate(images)
    ]
    resized = run_chain(stages[:1], records)
    hashes = np.stack([perceptual_hash(decode_jpeg(record.image)) for record in resized])
    identities = np.zeros((len(images), 512), np.float32)
    for row, record in enumerate(run_chain(stages[1:], resized) if embed else []):
        if record.identity is not None:
            identities[row] = record.identity
    return Seen(hashes, identities)


def perceptual_hash(image: Image) -> npt.NDArray[np.uint8]:
    """(32,): 256 bits."""
    return np.packbits(imagehash.phash(PILImage.fromarray(image), hash_size=16).hash.ravel())


def distances(left: npt.NDArray[np.uint8], right: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Bits in which hashes differ, (…, 32) against (…, 32)."""
    return np.asarray(np.bitwise_count(left ^ right).sum(-1, dtype=np.int64))


def strangers(seen: Seen) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """(hash distances, cosines) of all pairs of different pictures."""
    bits = [distances(seen.hashes[i], seen.hashes[i + 1 :]) for i in range(len(seen.hashes))]
    found = seen.identities[np.any(seen.identities, axis=1)]
    return np.concatenate(bits), (found @ found.T)[np.triu_indices(len(found), 1)]


def main(
    folder: Annotated[Path, typer.Argument(help="Pictures of different people.")],
    count: Annotated[int, typer.Option(min=2, help="Pictures embedded; all are hashed.")] = 300,
    edited: Annotated[int, typer.Option(min=1, help="Pictures that are edited.")] = 150,
    save: Annotated[Path | None, typer.Option(help="Keep the identities here, as .npy.")] = None,
    config: Annotated[Path, typer.Option(help="Preset of the data set.")] = Path(
        "configs/dataset/demo.yaml"
    ),
) -> None:
    """Print distances and cosines of strangers, and of copies by edit."""
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
    first = see([path.read_bytes() for path in names[:count]], stages, embed=True)
    rest = (
        see([path.read_bytes() for path in names[count:]], stages, embed=False)
        if names[count:]
        else None
    )
    if save is not None:
        np.save(save, first.identities)
    bits, _ = strangers(
        Seen(np.concatenate([first.hashes, rest.hashes]), first.identities) if rest else first
    )
    cosines = strangers(first)[1]
    print(
        f"strangers: {len(bits):,} pairs by hash, bits: "
        + _spread(bits, "{:.0f}", (0, 0.0001, 0.001, 0.01, 0.5))
    )
    print(
        f"strangers: {len(cosines):,} pairs by face, cosine: "
        + _spread(cosines, "{:.3f}", (0.5, 0.99, 0.999, 1))
    )
    originals = [decode_jpeg(path.read_bytes()) for path in names[:edited]]
    print(
        f"copies of {len(originals)}; of hashes: median, 95 %, largest; of cosines: median, 5 %, "
        "smallest; no face"
    )
    for name, edit in EDITS.items():
        copies = see([edit(image) for image in originals], stages, embed=True)
        far = distances(copies.hashes, first.hashes[: len(originals)])
        near = np.einsum("nd,nd->n", copies.identities, first.identities[: len(originals)])
        near = near[np.any(copies.identities, axis=1)]
        by_hash, by_face = (
            _spread(far, "{:.0f}", (0.5, 0.95, 1)),
            _spread(near, "{:.3f}", (0.5, 0.05, 0)),
        )
        print(f"{name:<28} {by_hash}   {by_face}   {len(far) - len(near)}", flush=True)


def _spread(
    values: npt.NDArray[np.int64] | FloatArray, form: str, quantiles: tuple[float, ...]
) -> str:
    return " ".join(form.format(value) for value in np.quantile(values, quantiles))


if __name__ == "__main__":
    typer.run(main)
