"""Speed of LLaVA captions with a shared prefix: `python -m bench.captions`.

The backend encodes an image once for both of its prompts (a shared prefill); this compares it with
two plain `generate` calls. The checkpoint has LLaVA-1.5's classes with random weights: the same two
prompts and number of image tokens (576), in a language model small enough for a CPU. Its texts have
no meaning, but all ways must give the same ones. The gain depends on the numbers of tokens read and
generated, not on which tokens they are.
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
from stages.codec import encode_jpeg
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
    tokens: Annotated[
        list[int] | None, typer.Argument(help="Numbers of new tokens in a caption.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each way.")] = 5,
    batch_size: Annotated[int, typer.Option(help="Images in a batch.")] = 4,
    threads: Annotated[int, typer.Option(help="Threads of torch; 0: all cores.")] = 0,
) -> None:
    """Print the time for an image in each way, and the ratios, for each number of tokens."""
    pin_threads(threads)
    images = [encode_jpeg(image, 95) for image in (astronaut(), cat(), chelsea(), coffee())]
    records = [
        Record(key=key_of(str(n)), source=str(n), image=images[n % len(images)])
        for n in range(batch_size)
    ]
    with tempfile.TemporaryDirectory(prefix="captions-") as folder:
        make_checkpoint(Path(folder), size=SIZE)
        print(
            "tokens   way          s an image   two calls / it     CPU-s an image  two calls / it",
            flush=True,
        )
        for count in tokens or (16, 64):
            config = LlavaConfig(model=folder, device="cpu", max_new_tokens=count)
            compare(Llava(config), records, rounds)


def compare(backend: Llava, records: Sequence[Record], rounds: int) -> None:
    """Runs all ways in turns on the same model and prints a row for each.

    The texts of all ways must be equal. Ratios are medians over the turns (lowest, highest).
    CPU-seconds vary less than seconds on a machine with other work.
    """
    ways: dict[str, Callable[..., Any]] = {
        "shared": partial(backend.caption, batch_size=len(records)),
        "one call": partial(one_call, backend),
        "two calls": partial(two_calls, backend),
    }
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    backend.caption(records, len(records))  # not timed, because the first call is slower
    for _ in range(rounds):
        texts: dict[str, Any] = {}
        for name, way in ways.items():
            costs[name].append(cost_of(partial(store, texts, name, way, records)))
        assert texts["shared"] == texts["one call"] == texts["two calls"], (
            "sharing a prefix must not change the texts"
        )
        assert len(set(texts["shared"])) == len({record.image for record in records}), (
            "each image must have another text"
        )
    for name, turns in costs.items():
        row = f"{backend.config.max_new_tokens:>6}   {name:10}"
        for unit in ("seconds", "cpu"):
            own = [getattr(cost, unit) for cost in turns]
            other = [getattr(cost, unit) for cost in costs["two calls"]]
            ratios = [b / a for a, b in zip(own, other, strict=True)]
            row += f" {median(own) / len(records):>13.2f}   {median(ratios):.2f}"
            row += f" ({min(ratios):.2f}, {max(ratios):.2f})"
        print(row, flush=True)


def store(
    texts: dict[str, Any], name: str, way: Callable[..., Any], records: Sequence[Record]
) -> None:
    texts[name] = way(records)


def two_calls(backend: Llava, records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Captions a batch with a `generate` call for each prompt."""
    images = [Image.fromarray(backend.shown(record, 0)[0]) for record in records]
    return list(
        zip(
            *(generate(backend, images, [prompt] * len(images)) for prompt in backend.prompts),
            strict=True,
        )
    )


def one_call(backend: Llava, records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Captions a batch in one `generate` call, with a row for each image and prompt, unshared.

    It tells the gain of the shared prefix from that of a larger batch.
    """
    images = [
        Image.fromarray(backend.shown(record, 0)[0]) for record in records for _ in backend.prompts
    ]
    texts = generate(backend, images, list(backend.prompts) * len(records))
    return list(zip(texts[::2], texts[1::2], strict=True))


def generate(backend: Llava, images: Sequence[Any], prompts: Sequence[str]) -> list[str]:
    """Generates a text for each image with its prompt."""
    inputs = backend.decoder.processor(
        images=list(images), text=list(prompts), padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        tokens = backend.decoder.model.generate(
            **inputs, max_new_tokens=backend.config.max_new_tokens, do_sample=False
        )
    texts = backend.decoder.tokenizer.batch_decode(
        tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [text.strip() for text in texts]


if __name__ == "__main__":
    typer.run(main)
