"""Both prompts of a picture from one prefill, beside two plain `generate` calls: `python -m
bench.captions`.

The checkpoint is LLaVA-1.5's own classes with random weights: the real one's 576 image tokens and
the configuration's two prompts, in a language model small enough for a CPU. Its words mean nothing,
but they must be the same each way. What is saved is the second reading of the picture: the share of
it depends on how much is read and how much written, not on what is said.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from skimage.data import astronaut, cat, chelsea, coffee

from bench.against import Cost, cost_of
from configs.captions import LlavaConfig
from stages.backends.llava import Llava
from stages.backends.runtime import pin_threads
from stages.codec import decode_jpeg, encode_jpeg
from stages.record import Record, key_of
from tests.stages.tiny_llava import Size, make_checkpoint

SIZE = Size(
    image=336,
    patch=14,
    hidden=512,
    layers=8,
    heads=8,
    vision_hidden=128,
    vision_layers=4,
    positions=2048,
)


def main(
    tokens: Annotated[list[int] | None, typer.Argument(help="New tokens a caption.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns, of each way.")] = 5,
    batch_size: Annotated[
        int, typer.Option(help="Pictures that go through the model together.")
    ] = 4,
    threads: Annotated[int, typer.Option(help="Of torch; 0: all cores.")] = 0,
) -> None:
    """Print, for each number of tokens, what a picture takes each way, and the ratios."""
    pin_threads(threads)
    pictures = [encode_jpeg(picture, 95) for picture in (astronaut(), cat(), chelsea(), coffee())]
    records = [
        Record(key=key_of(str(n)), source=str(n), image=pictures[n % len(pictures)])
        for n in range(batch_size)
    ]
    with tempfile.TemporaryDirectory(prefix="captions-") as folder:
        make_checkpoint(Path(folder), size=SIZE)
        print(
            "tokens   way         s a picture   two calls over it    CPU-s a picture   two calls "
            "over it",
            flush=True,
        )
        for count in tokens or (16, 64):
            config = LlavaConfig(model=folder, device="cpu", max_new_tokens=count)
            compare(Llava(config), records, rounds)


def compare(backend: Llava, records: Sequence[Record], rounds: int) -> None:
    """All ways in turns, on the same model; the texts must be the same each time. Prints a row for
    each.

    Ratios are medians (least, most) of the turns. CPU-seconds are steadier where the machine has
    other work too.
    """
    ways = {
        "shared": partial(backend.caption, batch_size=len(records)),
        "one call": partial(one_call, backend),
        "two calls": partial(two_calls, backend),
    }
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    # once outside the clock: the first call of anything is slower
    backend.caption(records, len(records))
    for _ in range(rounds):
        said: dict[str, Any] = {}
        for name, way in ways.items():
            costs[name].append(cost_of(partial(say, said, name, way, records)))
        assert said["shared"] == said["one call"] == said["two calls"], (
            "sharing a prefix must change no word"
        )
        assert len(set(said["shared"])) == len({record.image for record in records}), (
            "each picture has its own words"
        )
    for name, turns in costs.items():
        row = f"{backend.config.max_new_tokens:>6}   {name:10}"
        for unit in ("seconds", "cpu"):
            own, other = (
                [getattr(cost, unit) for cost in taken] for taken in (turns, costs["two calls"])
            )
            ratios = [b / a for a, b in zip(own, other, strict=True)]
            spread = f"({min(ratios):.2f}, {max(ratios):.2f})"
            row += f" {median(own) / len(records):>13.2f}   {median(ratios):.2f} {spread}"
        print(row, flush=True)


def say(
    said: dict[str, Any], name: str, way: Callable[..., Any], records: Sequence[Record]
) -> None:
    said[name] = way(records)


def two_calls(backend: Llava, records: Sequence[Record]) -> list[tuple[str, ...]]:
    """The same batch, each prompt in a `generate` call of its own."""
    images = [Image.fromarray(decode_jpeg(record.image)) for record in records]
    return list(
        zip(
            *(generate(backend, images, [prompt] * len(images)) for prompt in backend.prompts),
            strict=True,
        )
    )


def one_call(backend: Llava, records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Both prompts in one batch of twice the rows, and nothing shared: what is left of the gain is
    the prefix's.
    """
    images = [
        Image.fromarray(decode_jpeg(record.image)) for record in records for _ in backend.prompts
    ]
    texts = generate(backend, images, list(backend.prompts) * len(records))
    return list(zip(texts[::2], texts[1::2], strict=True))


def generate(backend: Llava, images: Sequence[Any], prompts: Sequence[str]) -> list[str]:
    inputs = backend.processor(
        images=list(images), text=list(prompts), padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        tokens = backend.model.generate(
            **inputs, max_new_tokens=backend.config.max_new_tokens, do_sample=False
        )
    texts = backend.tokenizer.batch_decode(
        tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [text.strip() for text in texts]


if __name__ == "__main__":
    typer.run(main)
