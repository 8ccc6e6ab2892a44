"""How much the light changes the colours that `attributes` names, on your photographs:
`python -m bench.attributes FOLDER`.

Each photograph goes through resize, detect and parse, and is then relit: in linear light, all
channels are multiplied for a lighter or darker photograph, red and blue for a warmer or cooler one.
A colour that is named before and after should be the same. Printed are, for each light, how many
photographs have a named colour before, in how many the name is another one after, is left out, and
is new. An image stays 8 bits per channel and a JPEG, so dark ones lose detail, as a camera's do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final

import cv2
import numpy as np
import typer

from configs.errors import PipelineError
from configs.load import load
from configs.schema import DatasetConfig
from stages.backends.appearance import Appearance
from stages.backends.attributes import appearance_of
from stages.backends.light import to_linear
from stages.backends.runtime import pin_threads
from stages.base import Stage, run_chain
from stages.chain import build_stages
from stages.codec import Image, decode_jpeg, encode_jpeg
from stages.record import Record, key_of

Gains = tuple[float, float, float]  # of red, green and blue in linear light

LIGHTS: Final[Mapping[str, Gains]] = {
    "1 stop darker": (0.5, 0.5, 0.5),
    "2 stops darker": (0.25, 0.25, 0.25),
    "half a stop lighter": (2**0.5, 2**0.5, 2**0.5),
    "warmer": (1.15, 1.0, 0.85),
    "cooler": (0.85, 1.0, 1.15),
}
COLORS: Final = {"hair": "hair_color", "clothes": "cloth_color", "background": "backdrop"}
STAGES: Final = ("resize", "detect", "parse")
_QUALITY: Final = 95  # of the relit JPEGs


def main(
    folder: Annotated[Path, typer.Argument(help="Searched at any depth for photographs.")],
    parse_again: Annotated[
        bool,
        typer.Option(help="Detect and parse the relit photographs too, instead of the first only."),
    ] = False,
    config: Annotated[Path, typer.Option(help="Preset of the data set.")] = Path(
        "configs/dataset/demo.yaml"
    ),
) -> None:
    """Print how many named colours change with the light."""
    pin_threads(1)
    cv2.setNumThreads(1)
    try:
        dataset = load(DatasetConfig, config)
        chain = [stage for stage in build_stages(dataset) if stage.name in STAGES]
        for stage in chain:
            stage.setup()
    except PipelineError as error:
        raise typer.BadParameter(str(error)) from error
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in dataset.source.extensions and path.is_file()
    )
    pairs = [pair for path in files if (pair := _appearances(path, chain, parse_again))]
    if not pairs:
        raise typer.BadParameter(
            f"none of the {len(files)} images in {folder} has a usable face; name a folder of "
            "photographs of people"
        )
    print(f"{len(pairs)} of {len(files)} photographs have a usable face\n")
    print("\n".join(table(pairs)))


def relit(image: Image, gains: Gains) -> Image:
    """Returns the image (H, W, 3), sRGB, in other light: linear values times `gains`, clipped."""
    linear = np.clip(to_linear(image) * np.array(gains, np.float32), 0, 1)
    low = linear <= 0.0031308
    srgb = np.where(low, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)
    return np.asarray(np.rint(srgb * 255), np.uint8)


def in_other_light(record: Record, gains: Gains) -> Record:
    """Returns the record with its image relit; label map and faces are kept."""
    return replace(record, image=encode_jpeg(relit(decode_jpeg(record.image), gains), _QUALITY))


def table(pairs: Sequence[tuple[Appearance, Mapping[str, Appearance | None]]]) -> Iterator[str]:
    """Yields a line for each light and part.

    pairs: the appearance of each photograph, and light → its appearance in that light, None where
    no face was found.
    """
    columns = ("named", "other name", "left out", "new")
    yield f"{'light':21}{'part':12}" + "".join(f"{name:>12}" for name in columns) + "   changed"
    for light in LIGHTS:
        for part, attribute in COLORS.items():
            names = [
                (getattr(before, attribute), getattr(after[light], attribute, ""))
                for before, after in pairs
            ]
            named = sum(bool(before) for before, _ in names)
            other = sum(bool(before and after) and before != after for before, after in names)
            left_out = sum(bool(before) and not after for before, after in names)
            new = sum(bool(after) and not before for before, after in names)
            share = f"{(other + left_out) / named:.1%}" if named else "-"
            numbers = "".join(f"{number:12}" for number in (named, other, left_out, new))
            yield f"{light:21}{part:12}{numbers}{share:>10}"


def _appearances(
    path: Path, chain: Sequence[Stage], parse_again: bool
) -> tuple[Appearance, dict[str, Appearance | None]] | None:
    source = Record(key=key_of(path.name), source=path.name, image=path.read_bytes())
    record = run_chain(chain, [source])[0]
    if not record.ok:
        return None
    after: dict[str, Appearance | None] = {}
    for light, gains in LIGHTS.items():
        other = in_other_light(record, gains)
        if parse_again:
            other = run_chain(chain, [replace(source, image=other.image)])[0]
        after[light] = appearance_of(other) if other.ok else None
    return appearance_of(record), after


if __name__ == "__main__":
    typer.run(main)
