"""Files that are no adapter, or a damaged one: each is named in one WeightsError."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from configs.errors import WeightsError
from model.checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from model.spec import PARTS, SPECS

TINY = SPECS["tiny"]
PUBLISHED = {
    key: torch.tensor(1.0)
    for key in ("image_proj.norm.weight", "FacialEncoder.a", "adapter_modules.a")
}


def error_of(source: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        read_adapter(source)
    return str(caught.value)


class Payload:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (Path(Payload.target),))

    target = ""


@pytest.mark.parametrize(
    "writer", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))]
)
def test_code_in_a_bin_is_not_run(tmp_path: Path, writer: Any) -> None:
    Payload.target = str(tmp_path / "ran")
    writer({"image_proj": Payload()}, tmp_path / "evil.bin")
    with pytest.raises(WeightsError):
        read_adapter(tmp_path / "evil.bin")
    assert not (tmp_path / "ran").exists()


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in asdict(TINY).items() if key != name}


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ({"format": None}, "its format is None, expected the number 1"),
        ({"format": "1"}, "its format is '1', expected the number 1"),
        ({"format": True}, "its format is True"),
        ({"format": 99}, "it has format 99, but this version reads format 1"),
        ({"mode": "fixed"}, "mode is 'fixed', expected legacy or corrected"),
        ({"mode": ["legacy"]}, "mode is ['legacy']"),
        ({"spec": "tiny"}, "spec is 'tiny', expected an object"),
        ({"spec": without("vision_dim")}, "spec.vision_dim is missing, expected a whole number"),
        ({"spec": without("hooked")}, "spec.hooked is missing, expected a list of texts"),
        ({"spec": {**asdict(TINY), "lora_rank": "128"}}, "spec.lora_rank is '128', expected a w"),
        ({"spec": {**asdict(TINY), "lora_rank": True}}, "spec.lora_rank is True"),
        ({"spec": {**asdict(TINY), "lora_rank": 10**30}}, "expected a whole number from 1 to"),
        ({"spec": {**asdict(TINY), "facial_depth": 65}}, "expected a whole number from 1 to 64"),
        ({"spec": {**asdict(TINY), "num_tokens": 0}}, "spec.num_tokens is 0"),
        ({"spec": {**asdict(TINY), "shortcut": 1}}, "spec.shortcut is 1, expected true or false"),
        ({"spec": {**asdict(TINY), "base": None}}, "spec.base is None, expected a text"),
        ({"spec": {**asdict(TINY), "hooked": [1]}}, "spec.hooked is [1]"),
        ({"spec": {**asdict(TINY), "depth_2": 1}}, "spec.depth_2 is a field that this version"),
        ({"spec": {**asdict(TINY), "without": "lora"}}, "spec.without is 'lora', expected a list"),
        ({"spec": {**asdict(TINY), "without": ["lora", "loss"]}}, "without is ['lora', 'loss'],"),
        ({"spec": {**asdict(TINY), "without": PARTS}}, "lora'], expected some of projector, fac"),
        ({"embedder": "w600k_r50"}, "embedder is 'w600k_r50', expected an object"),
        ({"embedder": {"name": "w", "sha256": "12"}}, "embedder.sha256 is '12', expected 64"),
        ({"embedder": {"name": 3, "sha256": "9c" * 32}}, "embedder.name is 3"),
    ],
)
def test_a_wrong_entry_of_the_json_is_named(
    folder: Path, entries: dict[str, Any], fault: str
) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    message = error_of(folder)
    assert message.startswith(f"{path}: ") and fault in message and "update" in message


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "it isn't JSON"),
        (b"\xff\xfe\x00", "it isn't JSON"),
        (b"[" * 100_000, "it isn't JSON"),
        (b"[]", "it holds a JSON list, expected an object"),
        (b"null", "it holds a JSON NoneType"),
        (b'{"peft_type": "LORA"}', "its format is None"),
    ],
)
def test_a_file_that_is_no_adapter_json_is_named(folder: Path, content: bytes, fault: str) -> None:
    (folder / CONFIG_FILE).write_bytes(content)
    assert error_of(folder).startswith(f"{folder / CONFIG_FILE}: {fault}")


def test_an_adapter_json_that_is_cut_anywhere_is_an_error(folder: Path) -> None:
    path = folder / CONFIG_FILE
    content = path.read_bytes()
    for length in range(len(content) - 1):  # the last byte is the end of the line
        path.write_bytes(content[:length])
        assert f"{path}: it isn't JSON" in error_of(folder)
    path.unlink()
    path.mkdir()
    assert f"{path}: it can't be read (Is a directory)" in error_of(folder)
    path.rmdir()
    assert f"{folder}: no adapter.json there" in error_of(folder)


def write_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, weights=np.zeros(3))


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def write_cut(path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"image_proj": {"norm.weight": torch.zeros(4_000)}}, buffer)
    path.write_bytes(buffer.getvalue()[:9_000])


def write_huge(path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4 << 40]}
    header = json.dumps({"image_proj_model.norm.weight": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize(
    ("name", "write", "fault"),
    [
        ("cut.bin", write_cut, "not a readable weights file"),
        ("numbers.npz", write_npz, "not a readable weights file"),
        ("numbers.bin", write_npz, "not a readable weights file"),
        ("archive.bin", write_zip, "not a readable weights file"),
        ("text.bin", lambda path: path.write_text("hello"), "not a readable weights file"),
        ("bytes.bin", lambda path: path.write_bytes(b"\x95" * 99), "it is no PyTorch file"),
        ("empty.bin", lambda path: path.write_bytes(b""), "not a readable weights file"),
        ("empty.safetensors", lambda path: path.write_bytes(b""), "not a readable weights file"),
        ("huge.safetensors", write_huge, "not a readable weights file"),
        (
            "long.safetensors",
            lambda path: path.write_bytes(b"\xff" * 8 + b"{}"),
            "not a readable weights file",
        ),
        ("tensor.bin", lambda path: torch.save(torch.zeros(1), path), "holds one Tensor"),
        ("step.bin", lambda path: torch.save({"step": 3}, path), "'step' is of type int"),
        (
            "twice.bin",
            lambda path: torch.save({"a.b": torch.zeros(1), "a": {"b": torch.zeros(1)}}, path),
            "'a.b' is in it twice",
        ),
        (
            "both.bin",
            lambda path: torch.save(
                {
                    name: {"norm.weight": torch.zeros(128)}
                    for name in ("image_proj", "image_proj_model", "FacialEncoder")
                },
                path,
            ),
            "holds image_proj, image_proj_model, FacialEncoder; expected",
        ),
        (
            "photomaker.bin",
            lambda path: torch.save({"id_encoder": {}, "lora_weights": {"a": torch.ones(1)}}, path),
            "this looks like a PhotoMaker file",
        ),
        (
            "faceid.bin",
            lambda path: torch.save({"ip_adapter": {"1.to_k_ip.weight": torch.ones(1)}}, path),
            "this looks like an IP-Adapter",
        ),
        (
            "lora.safetensors",
            lambda path: save_file(
                {f"lora_te_{i}.lora_up.weight": torch.zeros(1) for i in range(9)}, path
            ),
            "lora_te_3 and 5 more; expected",
        ),
        (
            "old-lora.safetensors",
            lambda path: save_file({"unet.mid.processor.to_q_lora.up": torch.zeros(1)}, path),
            "this looks like a LoRA",
        ),
        (
            "pytorch_model.bin",
            lambda path: torch.save(
                {"unet.a": torch.ones(1), "FacialEncoder.a": torch.ones(1)}, path
            ),
            "this looks like a training state, of which python -m model.convert",
        ),
        (
            "part.bin",
            lambda path: torch.save({**PUBLISHED, "image_proj.norm.weight": torch.ones(768)}, path),
            "adapter_modules.0.to_q_lora.down.weight is not in it; expected a tensor",
        ),
        (
            "none.bin",
            lambda path: torch.save(PUBLISHED, path),
            "norm.weight is of shape (); expected a tensor",
        ),
        (
            "rank.bin",
            lambda path: torch.save(
                {
                    **PUBLISHED,
                    "image_proj.norm.weight": torch.ones(768),
                    "adapter_modules.0.to_q_lora.down.weight": torch.ones(0, 320),
                },
                path,
            ),
            "adapter_modules.0.to_q_lora.down.weight is of shape (0, 320)",
        ),
        (
            "narrow.safetensors",
            lambda path: save_file(
                {
                    **PUBLISHED,
                    "image_proj.norm.weight": torch.zeros(512),
                    "adapter_modules.0.to_q_lora.down.weight": torch.zeros(4, 320),
                },
                path,
            ),
            "ID tokens are 512 wide, expected 128 (tiny), 64 (small), 768 (sd15), 2048 (sdxl)",
        ),
    ],
)
def test_a_foreign_or_damaged_file_is_named(
    tmp_path: Path, name: str, write: Callable[[Path], object], fault: str
) -> None:
    write(tmp_path / name)
    message = error_of(tmp_path / name)
    assert message.startswith(f"{tmp_path / name}: ") and fault in message


def test_a_weights_file_that_is_cut_or_a_folder_without_one_is_named(
    folder: Path, tmp_path: Path
) -> None:
    weights = folder / WEIGHTS_FILE
    content = weights.read_bytes()
    for length in (0, 7, 9, 200, len(content) // 2, len(content) - 1):
        weights.write_bytes(content[:length])
        assert f"{weights}: not a readable weights file" in error_of(folder)
    assert "no adapter there; check the path" in error_of(tmp_path / "nothing.bin")
    weights.rename(folder / "ip-adapter-faceid-plus_sd15.bin")
    message = error_of(folder)
    assert "holds adapter.json, ip-adapter-faceid-plus_sd15.bin; expected adapter.saf" in message
