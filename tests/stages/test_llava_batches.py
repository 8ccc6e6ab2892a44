"""The `llava` backend's batches: out of memory, rising sizes, numbers of tokens, tiles, and the
thread that prepares inputs.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from skimage.data import astronaut

from configs.captions import LlavaConfig
from configs.errors import ConfigError
from stages.backends.llava import Llava
from stages.backends.llava.batches import (
    MOST_TIMES,
    BatchSizes,
    Usage,
    is_out_of_memory,
    twice_fits,
)
from stages.backends.protocols import Kind
from stages.codec import encode_jpeg
from stages.record import Record
from tests.stages.records import texts_of
from tests.stages.tiny_llava import Size, make_checkpoint

# the prefill of eight images takes about 200 MB, in a model of 13 MB
WIDE = Size(hidden=32, layers=1, wide=1024)
MB = 2**20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_checkpoint(tmp_path_factory.mktemp("llava"))


def records_of(count: int, shapes: Sequence[tuple[int, int]] = ((96, 96),)) -> list[Record]:
    """Crops of one photograph, of the given (height, width) in turns."""
    crops = []
    for n in range(count):
        high, wide = shapes[n % len(shapes)]
        crops.append(astronaut()[n * 37 % 400 :][:high, n * 91 % 400 :][:, :wide])
    return [
        Record(key=f"{n:020x}", source=f"{n}.jpg", image=encode_jpeg(crop, 95))
        for n, crop in enumerate(crops)
    ]


def config_of(model: Path | str, **changes: Any) -> LlavaConfig:
    settings = {"device": "cpu", "max_new_tokens": 8, "face_max_new_tokens": 8}
    return LlavaConfig(model=str(model), **{**settings, **changes})


def recorded_sizes(backend: Llava) -> list[int]:
    """Returns a list that gets the number of images of each later batch of `caption`."""
    sizes: list[int] = []
    generate = backend.decoder.generate

    def recording(inputs: Any, tails: Any, most: Any) -> Any:
        sizes.append(len(tails) // 2)
        return generate(inputs, tails, most)

    backend.decoder.generate = recording  # type: ignore[method-assign]
    return sizes


def caption_in_little_memory(checkpoint: str) -> None:
    """Runs in a process of its own, whose address space it limits. Prints what happened as JSON."""
    torch.set_num_threads(1)
    records = records_of(8)
    backend = Llava(config_of(checkpoint, max_new_tokens=4, face_max_new_tokens=4))
    alone = [texts_of(backend.caption([record]))[0] for record in records]
    sizes = recorded_sizes(backend)
    wordy = Llava(config_of(checkpoint, prompt="face and nose " * 300))
    assert len({*alone}) == 8
    results: list[Any] = []
    limit_memory(160)
    for _ in range(2):
        results.append([texts_of(backend.caption(records, 8)) == alone, [*sizes]])
        sizes.clear()
    limit_memory(50)  # threads need some
    try:
        wordy.caption(records, 8)
    except ConfigError as error:
        results.append(str(error))
    limit_memory(10)
    try:
        Llava(config_of(checkpoint))
    except ConfigError as error:
        results.append(str(error))
    print(json.dumps(results))


def limit_memory(megabytes: int) -> None:
    """Lets this process have no more than that beside what it has."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + megabytes * MB
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def test_a_batch_that_does_not_fit_into_memory_is_halved_and_no_record_is_lost(
    tmp_path: Path,
) -> None:
    folder = make_checkpoint(tmp_path, size=WIDE)
    code = f"from {__name__} import *; caption_in_little_memory({str(folder)!r})"
    process = subprocess.run(
        [sys.executable, "-c", code],
        # Larger blocks are given back when they are freed. Weights are loaded without threads:
        # those hang if they get no memory.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MB), "HF_DEACTIVATE_ASYNC_LOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    first, second, error, no_model = json.loads(process.stdout)
    assert first[0] and second[0], "the captions are those of batches of one"
    sizes = [*first[1], *second[1]]
    assert sizes[0] == 8 and sizes == sorted(sizes, reverse=True), "the smaller size is remembered"
    assert first[1][-1] < 8
    assert error.startswith(f"caption.llava.model='{folder}': not even one image (batch size 1)")
    assert no_model.startswith(f"caption.llava.model='{folder}': the model doesn't fit into")
    for part in ("memory of cpu", "allocate", "caption.llava.dtype", "caption.llava.quantize=4bit"):
        assert part in error


def test_messages_about_memory_are_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as exhausted:
        np.empty(2**50)
    assert is_out_of_memory(exhausted.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling …"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))
    assert not is_out_of_memory(ValueError("not enough memory"))


def usage_of(before: int, peak: int, free: int, total: int = 100) -> Usage:
    return Usage(before=before, peak=peak, reserved=peak, free=free, total=total)


@pytest.mark.parametrize(
    ("usage", "share", "fits"),
    [
        (usage_of(20, 40, 60), 0.9, True),  # 20 + 2.5 · 20 = 70
        (usage_of(20, 40, 60), 0.6, False),
        (usage_of(20, 50, 50), 0.9, False),  # 95
        (usage_of(20, 40, 40), 0.9, True),  # 70 of the 80 that are free or its own
        (usage_of(20, 40, 30), 0.9, False),  # of 70
        (usage_of(20, 20, 80), 0.1, False),  # the model alone takes more than the share
    ],
)
def test_the_size_doubles_only_if_twice_the_batch_fits(
    usage: Usage, share: float, fits: bool
) -> None:
    assert twice_fits(usage, share) is fits


def test_sizes_rise_to_a_limit_and_never_above_what_did_not_fit() -> None:
    sizes = BatchSizes()
    for expected in (3, 6, 12, 24, 24):
        assert sizes.size(3) == expected
        sizes.double()
    assert MOST_TIMES == 8
    sizes.halve(24)
    for _ in range(2):
        assert (sizes.size(3), sizes.size(1)) == (12, 8)
        sizes.double()
    sizes.halve(3)  # a batch of few but long images
    assert sizes.size(3) == sizes.size(100) == 1


class Readings:
    """A meter that reports given usages, for a machine without a GPU."""

    def __init__(self, usages: Sequence[Usage]) -> None:
        self._usages = [*usages]

    def start(self) -> None:
        """Has nothing to measure."""

    def usage(self) -> Usage:
        return self._usages.pop(0)


def test_batches_grow_while_memory_is_left_and_captions_stay_the_same(checkpoint: Path) -> None:
    backend, records = Llava(config_of(checkpoint)), records_of(20)
    expected = texts_of(backend.caption(records, 1))
    assert backend.batches.meter is None, "on a CPU, sizes don't rise"
    sizes = recorded_sizes(backend)
    much, little = usage_of(20, 30, 70), usage_of(20, 60, 40)
    backend.batches.meter = Readings([much, much, much, little])
    assert texts_of(backend.caption(records, 1)) == expected
    # the inputs of the next batch are prepared before the current one is measured
    assert sizes == [1, 1, 2, 2, 4, 4, 6]
    sizes.clear()
    backend.batches.meter = None
    assert texts_of(backend.caption(records, 1)) == expected
    assert sizes == [8, 8, 4], "a later call begins with the size that fits"


def test_the_next_inputs_are_prepared_while_the_model_works(checkpoint: Path) -> None:
    backend, records = Llava(config_of(checkpoint)), records_of(6)
    prefix, generate = backend.decoder.prefix, backend.decoder.generate
    prepared: list[str] = []
    begun = threading.Event()

    def preparing(images: Any, prompts: Any) -> Any:
        prepared.append(threading.current_thread().name)
        begun.set()
        return prefix(images, prompts)

    def generating(inputs: Any, tails: Any, most: Any) -> Any:
        if len(prepared) < 3:
            begun.clear()
            assert begun.wait(30), "the next batch is prepared during this one"
        return generate(inputs, tails, most)

    backend.decoder.prefix = preparing  # type: ignore[method-assign]
    backend.decoder.generate = generating  # type: ignore[method-assign]
    backend.caption(records, 2)
    assert len(prepared) == 3 and all(name.startswith("preprocess") for name in prepared)
    assert not [t for t in threading.enumerate() if t.name.startswith("preprocess")]


def test_an_error_while_inputs_are_prepared_names_the_records_and_ends_the_thread(
    checkpoint: Path,
) -> None:
    backend, records = Llava(config_of(checkpoint)), records_of(4)
    sizes = recorded_sizes(backend)
    cut = Record(key="f" * 20, source="cut.jpg", image=records[0].image[:1500])
    with pytest.raises(ValueError) as caught:
        backend.caption([*records, cut], 2)
    assert "cut.jpg" in " ".join(caught.value.__notes__)
    assert sizes == [2, 2], "the batches before it were processed"
    assert not [t for t in threading.enumerate() if t.name.startswith("preprocess")]


@pytest.mark.parametrize(
    "kind", ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]
)
def test_each_caption_ends_at_its_own_number_of_tokens(kind: Any, tmp_path: Path) -> None:
    records, folder = records_of(4), make_checkpoint(tmp_path, kind)
    few, many, mixed = (
        Llava(config_of(folder, max_new_tokens=coarse, face_max_new_tokens=fine))
        for coarse, fine in ((5, 5), (12, 12), (5, 12))
    )
    # the third token of one face caption ends an answer; rows that have ended are filled with it
    rows = recorded_rows(many)
    many.caption(records[:1])
    end = rows[1][2]
    for backend in (few, many, mixed):
        tokenizer = backend.decoder.tokenizer
        backend.decoder.model.generation_config.eos_token_id = end
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end)
    kinds: list[Kind] = [0, 1, 0, 1]
    short, long = few.caption(records), many.caption(records)
    tries = [few.retry(records, kinds), many.retry(records, kinds)]
    assert {answer.finish for pair in long for answer in pair} == {"length", "stop"}
    rows = recorded_rows(mixed)
    for batch in (1, 4):
        rows.clear()
        captions = mixed.caption(records, batch)
        assert captions == [(a[0], b[1]) for a, b in zip(short, long, strict=True)]
        assert max(len(row) for row in rows) == 12
        assert sum(len(row) > 5 for row in rows) <= len(records), "captions have at most 5"
        assert mixed.retry(records, kinds, batch) == [tries[k][n] for n, k in enumerate(kinds)]


def recorded_rows(backend: Llava) -> list[list[int]]:
    """Returns a list that gets the tokens of each later answer."""
    rows: list[list[int]] = []
    answers = backend.decoder.answers

    def recording(tokens: Sequence[list[int]]) -> Any:
        rows.extend(tokens)
        return answers(tokens)

    backend.decoder.answers = recording  # type: ignore[method-assign]
    return rows


def test_rows_that_have_ended_leave_the_batch(checkpoint: Path) -> None:
    backend, records = Llava(config_of(checkpoint)), records_of(2)
    answers = recorded_rows(backend)
    backend.caption(records, 2)
    (_, ending, _, other) = answers
    end = next(token for token in ending[:3] if token not in other)
    backend = Llava(config_of(checkpoint, max_new_tokens=3, face_max_new_tokens=7))
    backend.decoder.model.generation_config.eos_token_id = end
    rows: list[int] = []
    backend.decoder.model.model.language_model.register_forward_pre_hook(
        lambda _, __, kw: rows.append(len(kw["inputs_embeds"])), with_kwargs=True
    )
    backend.caption(records, 2)
    # prefix; the tails and two more tokens of both captions; four more of one face caption
    assert rows == [2, 4, 4, 4, 1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_a_model_with_tiles_can_be_given_one_tile(kind: Any, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, kind)
    all_tiles, one_tile = (Llava(config_of(folder, tiles=tiles)) for tiles in ("all", "one"))
    shapes = [(high, wide) for high in (20, 28, 56, 83, 100) for wide in (28, 40, 57, 100)]
    for backend in (all_tiles, one_tile):
        counts = backend._image_tokens([[shape] for shape in shapes])
        for shape, count in zip(shapes, counts, strict=True):
            inputs = backend.decoder.inputs([[np.zeros((*shape, 3), np.uint8)]], ["<image>"])
            with torch.inference_mode():  # an error if model and processor disagree
                backend.decoder.model(**inputs)
            assert int((inputs["input_ids"] == backend.decoder.model.config.image_token_id).sum())
            assert count == int(
                (inputs["input_ids"] == backend.decoder.model.config.image_token_id).sum()
            )
    square = [[(56, 56)]]
    assert one_tile._image_tokens(square) == [16 + 4 * (4 + 1)]
    assert all_tiles._image_tokens(square) == [16 + 8 * (8 + 1)]
    records = records_of(6, [(96, 96), (96, 48), (28, 28)])
    captions = one_tile.caption(records, 1)
    assert captions == one_tile.caption(records, 4)
    assert captions != all_tiles.caption(records, 1)
