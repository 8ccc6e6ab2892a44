"""Speed of the caption backend `llava`: `python -m bench.captions`.

The captioner against bare `generate` of transformers with the same batch: one call for each of the
two prompts, on inputs that were made before. By default on a checkpoint with LLaVA-1.5's classes
and random weights, whose language model is small enough for a CPU: the same two prompts and 576
image tokens. Its texts have no meaning, but the time depends on the numbers of tokens only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Final

import torch
import typer

from bench.against import Cost, cost_of
from bench.pictures import pictures
from configs.captions import FACE_MAX_NEW_TOKENS, MAX_NEW_TOKENS, LlavaConfig
from stages.backends.llava import Llava
from stages.backends.llava.batches import Batches
from stages.backends.runtime import pin_threads, torch_device
from stages.codec import _decode_cached
from stages.record import Record
from tests.stages.tiny_llava import Size, make_checkpoint

SIZE: Final = Size(
    image=336,
    patch=14,
    hidden=512,
    layers=8,
    heads=8,
    vision_hidden=128,
    vision_layers=4,
    positions=4096,
)
Texts = list[tuple[str, str]]


def main(
    model: Annotated[str, typer.Option(help="Folder or hub id; '': random weights.")] = "",
    kind: Annotated[
        str, typer.Option(help="Classes of random weights, e.g. llava_next.")
    ] = "llava",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    tiles: Annotated[str, typer.Option(help="all or one.")] = "all",
    tokens: Annotated[int, typer.Option(help="Tokens of a caption.")] = MAX_NEW_TOKENS,
    face_tokens: Annotated[int, typer.Option(help="Of a face caption.")] = FACE_MAX_NEW_TOKENS,
    batch_size: Annotated[int, typer.Option(help="Pictures in a batch.")] = 4,
    batches: Annotated[int, typer.Option(help="Batches in a turn.")] = 2,
    rounds: Annotated[int, typer.Option(help="Turns of each way.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of torch; 0: all cores.")] = 0,
    least: Annotated[float, typer.Option(help="Exit with 1 below this ratio.")] = 0.95,
) -> None:
    """Print a table of the ways, each against `generate`, and whether the captioner is as fast."""
    pin_threads(threads)
    records = pictures(batch_size * batches)
    with checkpoint(model, kind) as folder:
        settings: dict[str, Any] = {"dtype": dtype, "tiles": tiles, "device": device}
        settings |= {"max_new_tokens": tokens, "face_max_new_tokens": face_tokens}
        backend = Llava(LlavaConfig(model=folder, memory_share=0, **settings))
    ratio = compare(backend, records, batch_size, rounds)
    print(f"captions ÷ generate: {ratio:.2f}; expected at least {least:.2f}")
    raise typer.Exit(ratio < least)


@contextmanager
def checkpoint(model: str, kind: str) -> Iterator[str]:
    """Yields `model`, or the folder of a checkpoint of these classes with random weights."""
    if model:
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="captions-") as folder:
        make_checkpoint(Path(folder), kind, size=SIZE)  # type: ignore[arg-type]
        yield folder


def compare(backend: Llava, records: Sequence[Record], batch_size: int, rounds: int) -> float:
    """Runs all ways in turns on the same model and prints a row for each. Returns the median of the
    captioner's pictures/s ÷ those of `generate`.

    Ratios are those of neighbouring turns: median (lowest, highest). CPU-seconds vary less than
    seconds on a machine with other work. In float32 the texts of all ways must be equal.
    """
    parts = [records[n : n + batch_size] for n in range(0, len(records), batch_size)]
    ready = [[inputs_of(backend, part, prompt) for prompt in backend.prompts] for part in parts]
    ways: dict[str, Callable[[], Texts]] = {
        "captions": lambda: _texts(backend.caption(records, batch_size)),
        "without a thread": lambda: [pair for part in parts for pair in serial(backend, part)],
        "generate": lambda: [pair for inputs in ready for pair in generated(backend, inputs)],
        "two calls": lambda: [pair for part in parts for pair in two_calls(backend, part)],
    }
    if (device := torch_device(backend.config.device)).startswith("cuda"):
        ways["rising batches"] = partial(rising, backend, Batches(device, 0.9), records, batch_size)
    with torch.inference_mode():
        tokens = sum(generated_tokens(backend, inputs) for inputs in ready)
        expected = ways["generate"]()
        same = {name: _share(way(), expected) for name, way in ways.items()}  # the first are slower
        costs: dict[str, list[Cost]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                _decode_cached.cache_clear()
                costs[name].append(cost_of(way))
    if backend.config.dtype == "float32":
        assert set(same.values()) == {1.0}, f"texts differ from those of `generate`: {same}"
    print(f"{len(records)} pictures, {tokens / len(records):.0f} tokens each")
    print(
        "way                pictures/s  tokens/s  ÷ generate           CPU-s each  ÷  equal texts"
    )
    for name, turns in costs.items():
        speed = len(records) / median(cost.seconds for cost in turns)
        cpu = median(cost.cpu for cost in turns) / len(records)
        ratios = [_ratios(costs, name, unit) for unit in ("seconds", "cpu")]
        print(
            f"{name:17}  {speed:10.3f}  {speed * tokens / len(records):8.1f}  {_shown(ratios[0])}"
            f"  {cpu:10.3f}  {_shown(ratios[1])}  {same[name]:.0%}",
            flush=True,
        )
    return median(_ratios(costs, "captions", "seconds"))


def _ratios(costs: dict[str, list[Cost]], name: str, unit: str) -> list[float]:
    """Returns the cost of `generate` ÷ that of `name`, for each turn: how much faster `name` is."""
    pairs = zip(costs["generate"], costs[name], strict=True)
    return [getattr(bare, unit) / getattr(own, unit) for bare, own in pairs]


def _shown(ratios: Sequence[float]) -> str:
    return f"{median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"


def _share(texts: Texts, expected: Texts) -> float:
    """Returns the share of equal texts."""
    pairs = zip(texts, expected, strict=True)
    return sum(a == b for one, other in pairs for a, b in zip(one, other, strict=True)) / (
        2 * len(texts)
    )


def _texts(answers: Sequence[Any]) -> Texts:
    return [(coarse.text, fine.text) for coarse, fine in answers]


def inputs_of(backend: Llava, records: Sequence[Record], prompt: str) -> dict[str, Any]:
    decoder = backend.decoder
    shown = [backend.shown(record, 0) for record in records]
    return decoder.moved(decoder.inputs(shown, [prompt] * len(records)))


def serial(backend: Llava, records: Sequence[Record]) -> Texts:
    """Captions a batch as the captioner does, in one thread."""
    shown = [backend.shown(record, 0) for record in records]
    prefix = backend.decoder.prefix(shown, backend.prompts)
    answers = backend.decoder.generate(*prefix, backend.most * len(records))
    return _texts(list(zip(answers[::2], answers[1::2], strict=True)))


def two_calls(backend: Llava, records: Sequence[Record]) -> Texts:
    """Captions a batch with a `generate` call for each prompt, and makes the inputs of each."""
    return generated(backend, [inputs_of(backend, records, prompt) for prompt in backend.prompts])


def generated(backend: Llava, inputs: Sequence[dict[str, Any]]) -> Texts:
    """Returns the texts of both prompts' inputs, by a `generate` call for each."""
    texts = [
        backend.decoder.tokenizer.batch_decode(rows, skip_special_tokens=True)
        for rows in _generate(backend, inputs)
    ]
    return [(coarse.strip(), fine.strip()) for coarse, fine in zip(*texts, strict=True)]


def generated_tokens(backend: Llava, inputs: Sequence[dict[str, Any]]) -> int:
    """Returns how many tokens the answers have, without those that fill shorter ones."""
    ends = torch.tensor(backend.decoder._end_tokens(), device=backend.decoder.model.device)
    total = 0
    for rows in _generate(backend, inputs):
        ended = torch.isin(rows, ends)
        total += int((ended.cumsum(dim=1) - ended.int() == 0).sum())
    return total


def _generate(backend: Llava, inputs: Sequence[dict[str, Any]]) -> Iterator[Any]:
    for rows, most in zip(inputs, backend.most, strict=True):
        tokens = backend.decoder.model.generate(
            **rows, generation_config=backend.decoder.greedy(most)
        ).sequences
        yield tokens[:, rows["input_ids"].shape[1] :]


def rising(backend: Llava, batches: Batches, records: Sequence[Record], batch_size: int) -> Texts:
    """Captions with batches that grow, over all turns, as far as the GPU's memory allows."""
    fixed, backend.batches = backend.batches, batches
    try:
        return _texts(backend.caption(records, batch_size))
    finally:
        backend.batches = fixed


if __name__ == "__main__":
    typer.run(main)
