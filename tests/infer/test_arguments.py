"""Wrong arguments of the pipelines, and photographs of every kind, give an error that says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from configs.errors import ConfigError, SourceError
from infer.components import precision
from infer.identity import Identity
from infer.photo import as_record
from infer.pipelines import ConsistentIDPipeline
from tests.infer.helpers import run

ARRAY = np.full((64, 64, 3), 99, np.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 3}, "prompt=3: expected a text"),
        ({"prompt": []}, r"prompt=\[\]: expected a text"),
        ({"prompt": ["a", 3]}, r"prompt=\['a', 3\]: expected a text"),
        ({"prompt": [["a"]]}, "expected a text or a list of texts"),
        ({"prompt": {"a": 1}}, "expected a text or a list of texts"),
        ({"negative_prompt": 3}, "negative_prompt=3: expected a text"),
        ({"negative_prompt": ["a", "b"]}, "2 texts in negative_prompt for 1 prompts"),
        ({"face_caption": 3}, "face_caption=3: expected a text"),
        ({"start_merge_step": "3"}, "start_merge_step='3': expected a number of steps"),
        ({"start_merge_step": None}, "start_merge_step=None: expected"),
        ({"start_merge_step": True}, "start_merge_step=True: expected"),
        ({"start_merge_step": 7}, "start_merge_step=7: expected a number of steps, 0 to 6"),
        ({"start_merge_step": 1.5}, "start_merge_step=1.5: expected"),
        ({"num_inference_steps": 0}, "num_inference_steps=0: expected a number of steps"),
        ({"identity": "ada"}, "identity=str: expected what encode_identity"),
        ({"identity": ["ada"]}, "identity=list: expected what encode_identity"),
        ({"identity": torch.zeros(512)}, "identity=Tensor: expected what encode_identity"),
        ({"identity": []}, "0 people for 1 prompts"),
        ({"identity": None, "input_id_images": []}, "no photograph is given"),
        ({"input_id_images": "ada.jpg"}, "pass either input_id_images or identity"),
    ],
)
def test_a_wrong_argument_of_a_call(
    pipe: ConsistentIDPipeline, person: Identity, arguments: dict[str, Any], message: str
) -> None:
    call = {"prompt": "a man"} | arguments
    with pytest.raises(ConfigError, match=message):
        run(pipe, call.pop("identity", person), call.pop("prompt"), **call)


@pytest.mark.parametrize(
    ("photo", "message"),
    [
        (3, "it is of type int"),
        (None, "it is of type NoneType"),
        (torch.zeros(64, 64, 3), "it is of type Tensor"),
        (ARRAY / 255, r"shape \(64, 64, 3\) and type float64"),
        (ARRAY.transpose(2, 0, 1), r"shape \(3, 64, 64\)"),
        (ARRAY[..., :1], r"shape \(64, 64, 1\)"),
        (ARRAY[None], r"shape \(1, 64, 64, 3\)"),
        (ARRAY[:0], "empty"),
        (Image.new("RGB", (0, 0)), "empty"),
        (Image.new("F", (64, 64)), "floating-point"),
    ],
)
def test_what_is_no_photograph(photo: Any, message: str) -> None:
    with pytest.raises(SourceError, match=f"the photograph can't be used: .*{message}"):
        as_record(photo)


def test_images_of_every_mode_are_photographs(
    pipe: ConsistentIDPipeline, person: Identity, photo: Path
) -> None:
    with Image.open(photo) as image:
        image.load()
    modes = ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16"]
    for mode in modes:
        assert as_record(image.resize((64, 64)).convert(mode)).image
    for picture in (np.asarray(image.convert("RGBA")), (photo,)):
        assert float(pipe.encode_identity(picture).embedding @ person.embedding) > 0.99  # type: ignore[arg-type]


def test_an_images_orientation_is_that_of_its_file(photo: Path, tmp_path: Path) -> None:
    with Image.open(photo) as image:
        exif = image.getexif()
        exif[0x0112] = 6  # to be turned to the right
        small = image.resize((64, 96))
    small.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        record = as_record(turned)
    (tmp_path / "again.png").write_bytes(record.image)
    with Image.open(tmp_path / "again.png") as again:
        assert np.array_equal(np.asarray(again), np.asarray(small)) and not again.getexif().get(
            0x0112
        )


@pytest.mark.parametrize("scale", ["1", None, {"eyes": "1"}, {3: 1}, {"chin": 1}, -1])
def test_a_wrong_scale(pipe: ConsistentIDPipeline, scale: Any) -> None:
    with pytest.raises(ConfigError, match="scale of"):
        pipe.set_consistentid_scale(scale)


def test_precisions() -> None:
    assert precision("auto", "cpu") == torch.float32
    assert precision({"unet": "bfloat16", "default": torch.float32}) == {
        "unet": torch.bfloat16,
        "default": torch.float32,
    }
    for wrong in ("int8", "", 3, {"unet": "double trouble"}):
        with pytest.raises(ConfigError, match="expected auto, float32"):
            precision(wrong)


@pytest.mark.parametrize("face", [-1, 2, 1.5, "1"])
def test_a_face_that_the_photograph_does_not_show(
    pipe: ConsistentIDPipeline, photo: Path, face: Any
) -> None:
    with pytest.raises(ConfigError, match="the photograph shows 1 face"):
        pipe.encode_identity(photo, face=face)
