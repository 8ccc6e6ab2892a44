"""Recall and false matches of `takedown --photo` on your photographs: `python -m bench.people
FOLDER`.

FOLDER has a folder for each person, with photographs of that person: FOLDER/PERSON/*.jpg. Each
photograph's largest face goes through resize, detect and embed, as in a take-down. Printed are, by
threshold, the mean share of a person's other photographs that a photograph finds, the share of
photographs that find all of them, and how many pairs of different people match. The thresholds in
use are in stages/backends/same_person.py. Photographs of one occasion make the recall look better
than it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import cv2
import numpy as np
import typer

from bench.person_rates import rates, table
from configs.errors import PipelineError
from configs.load import load
from configs.schema import DatasetConfig
from pipelines.takedown.photos import photo_records
from stages.backends.runtime import pin_threads
from stages.backends.same_person import same_person
from stages.record import IDENTITY_DIM, Record

_TOGETHER: Final = 64  # photographs that are in memory at a time


def main(
    folder: Annotated[Path, typer.Argument(help="Has a folder of photographs for each person.")],
    weights: Annotated[str, typer.Option(help="The embedder; default: that of the preset.")] = "",
    config: Annotated[Path, typer.Option(help="Preset of the data set.")] = Path(
        "configs/dataset/demo.yaml"
    ),
) -> None:
    """Print recall and false matches by threshold."""
    pin_threads(1)
    cv2.setNumThreads(1)
    try:
        dataset = load(DatasetConfig, config, [f"embed.weights={weights}"] if weights else [])
        files = sorted(
            path
            for path in folder.glob("*/*")
            if path.suffix.lower() in dataset.source.extensions and path.is_file()
        )
        people, vectors = embed(files, dataset)
    except PipelineError as error:
        raise typer.BadParameter(str(error)) from error
    if len(vectors) < 2:
        raise typer.BadParameter(
            f"{len(vectors)} of {len(files)} photographs in {folder} have a usable face; expected "
            "FOLDER/PERSON/*.jpg with at least two."
        )
    name = dataset.embed.weights
    print(f"{len(vectors)} of {len(files)} photographs, {len(set(people))} people, {name}")
    print(f"threshold in use: {same_person(name).cosine:.2f}")
    for photos in (1, 2, 3):
        lines = rates(vectors, people, photos)
        if photos > 1 and not lines[0].queries:
            break
        print(f"\n{lines[0].queries} queries of {photos} photograph{'s' * (photos > 1)}")
        print("\n".join(table(lines)))


def embed(
    files: Sequence[Path], config: DatasetConfig
) -> tuple[list[str], np.ndarray[tuple[int, int], np.dtype[np.float32]]]:
    """Returns the people shown, and their embeddings (N, 512). Prints the photographs without a
    usable face.
    """
    people, vectors = list[str](), list[np.ndarray[tuple[int], np.dtype[np.float32]]]()
    for start in range(0, len(files), _TOGETHER):
        part = files[start : start + _TOGETHER]
        for path, record in zip(part, photo_records(config, part), strict=True):
            if record.identity is None:
                print(f"not used: {path}: {_why(record)}")
                continue
            people.append(path.parent.name)
            vectors.append(record.identity)
    return people, np.asarray(vectors, np.float32).reshape(-1, IDENTITY_DIM)


def _why(record: Record) -> str:
    return f"{record.reason.replace('_', ' ')} {record.detail}".strip()


if __name__ == "__main__":
    typer.run(main)
