"""Checkpoints of all families with their published settings load, also where files are missing, and
captions don't depend on the batch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from skimage.data import astronaut, cat, coffee, rocket

from configs.captions import LlavaConfig
from stages.backends.llava import Llava
from stages.backends.llava.loading import automatic_dtype
from stages.codec import encode_jpeg
from stages.record import Record
from tests.stages.records import texts_of
from tests.stages.tiny_llava import PUBLISHED, Kind, make_checkpoint


def without_processor_config(folder: Path) -> Path:
    """Removes what a fine-tuned LLaVA-1.5 checkpoint often lacks: processor_config.json, which
    states how many tokens an image has.
    """
    path = folder / "processor_config.json"
    images = json.loads(path.read_text())["image_processor"]
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    path.unlink()
    return folder


def with_fast_image_processor(folder: Path) -> Path:
    """Names the image processor of a Qwen checkpoint as version 4 of transformers wrote it, whose
    video processor had no file of its own.
    """
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor_type"] += "Fast"
    path.write_text(json.dumps(settings))
    return folder


BROKEN: dict[str, tuple[Kind, Callable[[Path], Path]]] = {
    "llava without processor_config.json": ("llava", without_processor_config),
    "qwen2_5_vl with a fast image processor": ("qwen2_5_vl", with_fast_image_processor),
    "qwen3_5 with a fast image processor": ("qwen3_5", with_fast_image_processor),
}


def record_of(number: int, image: Any, size: tuple[int, int]) -> Record:
    """Returns a record of the image, scaled to this width and height."""
    scaled = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return Record(key=f"{number:020x}", source=str(number), image=encode_jpeg(scaled, 95))


def records_of(*sizes: tuple[int, int]) -> list[Record]:
    images = (astronaut(), cat(), coffee(), rocket())
    pairs = zip(images, sizes, strict=True)
    return [record_of(number, image, size) for number, (image, size) in enumerate(pairs)]


def backend_of(folder: Path, **changes: Any) -> Llava:
    settings: dict[str, Any] = {"device": "cpu", "max_new_tokens": 8, **changes}
    settings.setdefault("face_max_new_tokens", settings["max_new_tokens"])
    return Llava(LlavaConfig(model=str(folder), **settings))


def captions(backend: Llava, records: list[Record], batch_size: int) -> list[Any]:
    return [
        pair
        for start in range(0, len(records), batch_size)
        for pair in texts_of(backend.caption(records[start : start + batch_size], batch_size))
    ]


@pytest.mark.parametrize("layout", [*PUBLISHED, *BROKEN])
def test_a_checkpoint_loads_and_its_captions_are_those_of_images_alone(
    layout: Any, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    kind, damage = BROKEN.get(layout, (layout, None))
    folder = make_checkpoint(tmp_path, kind, seed=5, size=PUBLISHED[kind])
    equal = records_of(*[(96, 128)] * 4)
    padded = records_of((96, 96), (96, 192), (192, 96), (160, 96))
    expected = None
    if damage:
        intact = backend_of(folder)
        expected = [captions(intact, records, 4) for records in (equal, padded)]
        damage(folder)
    backend = backend_of(folder)
    masks: list[torch.Tensor | None] = []  # None: no row is padded
    backend.decoder.model.register_forward_pre_hook(
        lambda _, __, inputs: masks.append(inputs.get("attention_mask")), with_kwargs=True
    )
    together = [captions(backend, records, 4) for records in (equal, padded)]
    lengths = [mask.sum(1).tolist() for mask in masks if mask is not None and len(mask) == 4]
    rows_are_padded = any(len(set(each)) > 1 for each in lengths)
    assert rows_are_padded == (kind != "llava"), "LLaVA-1.5 has images of one length only"
    assert together == [captions(backend, records, 1) for records in (equal, padded)]
    assert expected in (None, together)
    for pairs in together:
        assert len({text for pair in pairs for text in pair}) >= 6, (
            "the test needs captions that depend on image and prompt"
        )


def test_a_model_that_can_think_is_told_not_to(tmp_path: Path) -> None:
    backend = backend_of(make_checkpoint(tmp_path, "qwen3_5"))
    assert all(prompt.endswith("<think>\n\n</think>\n\n") for prompt in backend.prompts)


def test_what_a_processor_states_is_not_replaced(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    del settings["patch_size"]
    settings["num_additional_image_tokens"] = 5  # as of a tower with register tokens
    path.write_text(json.dumps(settings))
    processor = backend_of(folder).decoder.processor
    assert (processor.patch_size, processor.num_additional_image_tokens) == (7, 5)


def test_an_automatic_dtype_depends_on_device_and_checkpoint() -> None:
    stored = ("float32", "bfloat16", "float16", "None")
    chosen = {
        ("cpu", False): ["float32"] * 4,
        ("cuda", True): ["bfloat16", "bfloat16", "float16", "bfloat16"],
        ("cuda:1", False): ["float16"] * 4,
        ("mps", False): ["float16"] * 4,
    }
    for (device, has_bfloat16), expected in chosen.items():
        assert [automatic_dtype(dtype, device, has_bfloat16) for dtype in stored] == expected


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_on_a_cpu_a_checkpoint_of_16_bits_is_computed_in_32(stored: str, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(make_checkpoint(tmp_path / "model"), half)
    model = backend_of(half).decoder.model
    model.to(getattr(torch, stored)).save_pretrained(half)
    assert json.loads((half / "config.json").read_text())["dtype"] == stored
    backend = backend_of(half)
    assert backend.config.dtype == "auto" and backend.decoder.model.dtype == torch.float32
