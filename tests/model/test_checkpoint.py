import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from configs.errors import WeightsError
from model.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    build_adapter,
    load_adapter,
    read_adapter,
    save_adapter,
    save_unet,
)
from model.consistentid import BaseModels, ConsistentID, load_base, predict_noise
from model.spec import PUBLISHED_EMBEDDER, SPECS, Embedder, ModelSpec
from stages.backends.weights import WEIGHTS

TINY = SPECS["tiny"]
EMBEDDER = Embedder(name="w600k_mbf", sha256="9c" * 32)


def new_model(
    base: BaseModels, seed: int, mode: Any = "corrected", spec: ModelSpec = TINY
) -> ConsistentID:
    torch.manual_seed(seed)
    return ConsistentID(spec, base.unet, mode)


def nested(model: ConsistentID, projector: str) -> dict[str, dict[str, torch.Tensor]]:
    """Returns a state dict in the form of the published .bin files."""
    return {
        projector: model.image_proj_model.state_dict(),
        "adapter_modules": model.adapter_modules.state_dict(),
        "FacialEncoder": model.FacialEncoder.state_dict(),
    }


def same(one: ConsistentID, two: ConsistentID) -> bool:
    other = two.state_dict()
    return all(torch.equal(value, other[key]) for key, value in one.state_dict().items())


@pytest.fixture(scope="module")
def saved(loaded_base: BaseModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = new_model(replace(loaded_base, unet=deepcopy(loaded_base.unet)), 1)
    folder = tmp_path_factory.mktemp("adapter")
    return save_adapter(model, folder, {"embedder": asdict(EMBEDDER)})


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """An adapter, which the test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "mine"))


def error_of(source: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        read_adapter(source)
    return str(caught.value)


def test_round_trip_keeps_weights_mode_spec_and_config(base: BaseModels, tmp_path: Path) -> None:
    spec = replace(TINY, lora_rank=4)
    one, two = new_model(base, 1, "legacy", spec), new_model(base, 2, "legacy", spec)
    assert not same(one, two)
    save_adapter(one, tmp_path, {"step": 7})
    adapter = read_adapter(tmp_path)
    assert (adapter.spec, adapter.mode, adapter.config["step"]) == (spec, "legacy", 7)
    assert adapter.embedder is None  # as in files of version 0.1
    assert load_adapter(tmp_path, two)["step"] == 7
    assert same(one, two)
    assert {key.partition(".")[0] for key in load_file(tmp_path / WEIGHTS_FILE)} == {
        "image_proj_model",
        "adapter_modules",
        "FacialEncoder",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_an_adapter_names_the_embedder_it_was_trained_with(folder: Path) -> None:
    assert read_adapter(folder).embedder == read_adapter(folder / WEIGHTS_FILE).embedder == EMBEDDER
    table = WEIGHTS[PUBLISHED_EMBEDDER.name]
    assert (table.role, table.sha256) == ("embed", PUBLISHED_EMBEDDER.sha256)


@pytest.mark.parametrize("projector", ["image_proj", "image_proj_model"])
def test_published_bin_loads_under_either_name(
    base: BaseModels, tmp_path: Path, projector: str
) -> None:
    spec = replace(TINY, lora_rank=4)
    one, two = new_model(base, 1, "legacy", spec), new_model(base, 2, "legacy", spec)
    torch.save(nested(one, projector), tmp_path / "ConsistentID-v1.bin")
    adapter = read_adapter(tmp_path / "ConsistentID-v1.bin")
    assert (adapter.mode, adapter.spec) == ("legacy", spec)
    assert adapter.embedder == PUBLISHED_EMBEDDER
    load_adapter(adapter, two)
    assert same(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_building_gives_the_same_model_as_loading(
    base: BaseModels, folder: Path, dtype: torch.dtype
) -> None:
    adapter = read_adapter(folder)
    for key, value in adapter.state.items():  # also the half of the LoRA that starts at zero
        if key.endswith("up.weight"):
            torch.nn.init.normal_(value, std=0.1)
    base.unet.to(dtype)
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([7, 501]), torch.randn(2, 81, 128))
    filled = new_model(base, 2)
    load_adapter(adapter, filled)
    filled.requires_grad_(False).to(dtype=dtype)
    with torch.no_grad():
        expected = predict_noise(base.unet, *inputs)[0]
        built = build_adapter(adapter, base.unet, dtype, "cpu")
        assert torch.equal(predict_noise(base.unet, *inputs)[0], expected)
    assert same(built, filled) and not built.training
    tensors = [*built.named_parameters(), *built.named_buffers(), *base.unet.named_parameters()]
    assert {value.device.type for _, value in tensors} == {"cpu"}
    assert {value.dtype for _, value in tensors} == {dtype}
    assert not any(value.requires_grad for value in built.parameters())
    with torch.no_grad():
        built.image_proj_model.norm.weight += 1  # of its own memory
    assert read_adapter(folder).state["image_proj_model.norm.weight"].max() == 1


def test_building_draws_no_random_numbers(base: BaseModels, folder: Path) -> None:
    adapter, before = read_adapter(folder), torch.get_rng_state()
    build_adapter(adapter, base.unet, torch.float32, "cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_building_that_fails_leaves_the_unet_as_it_was(base: BaseModels, folder: Path) -> None:
    adapter, before = read_adapter(folder), base.unet.attn_processors
    state = {**adapter.state}
    state["adapter_modules.10.to_k_lora.up.weight"] = torch.zeros(3, 16)
    del state["adapter_modules.9.to_k_ip.weight"]
    fault = "first wrong key is adapter_modules.9.to_k_ip.weight: not given, expected .48, 128."
    with pytest.raises(WeightsError, match=fault):
        build_adapter(replace(adapter, state=state), base.unet, torch.float32, "cpu")
    assert base.unet.attn_processors == before
    spec = replace(TINY, lora_rank=8)
    fault = "adapter_modules.0.to_k_lora.down.weight: given .16, 48., expected .8, 48."
    with pytest.raises(WeightsError, match=fault):
        build_adapter(replace(adapter, spec=spec), base.unet, torch.float32, "cpu")
    assert base.unet.attn_processors == before


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


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"image_proj_model.norm.bias": None, "adapter_modules.0.extra": torch.zeros(1)},
            "image_proj_model.norm.bias: not given, expected (128,) "
            "(of 181 keys, 1 missing, 1 unexpected)",
        ),
        (
            {
                "adapter_modules.10.to_q_lora.up.weight": torch.zeros(3),
                "adapter_modules.2.to_q_lora.up.weight": torch.zeros(96, 4),
            },
            "adapter_modules.2.to_q_lora.up.weight: given (96, 4), expected (96, 16) "
            "(of 181 keys, 2 mis-shaped)",
        ),
        (
            {"FacialEncoder.extra": torch.zeros(1)},
            "FacialEncoder.extra: given (1,), expected no such key (of 181 keys, 1 unexpected)",
        ),
        (
            {"image_proj_model.norm.bias": torch.zeros(128, dtype=torch.int8)},
            "image_proj_model.norm.bias: given int8 (128,), expected (128,)",
        ),
    ],
)
def test_the_error_names_the_first_key_that_does_not_fit(
    base: BaseModels, folder: Path, changes: dict[str, torch.Tensor | None], fault: str
) -> None:
    state = {**load_file(folder / WEIGHTS_FILE), **changes}
    save_file({k: v for k, v in state.items() if v is not None}, folder / WEIGHTS_FILE)
    with pytest.raises(WeightsError) as caught:
        load_adapter(folder, new_model(base, 1))
    assert f"{folder} doesn't fit model 'tiny'" in str(caught.value)
    assert f"the first wrong key is {fault}" in str(caught.value)


def test_the_other_mode_is_refused(base: BaseModels, folder: Path) -> None:
    with pytest.raises(WeightsError, match="corrected mode"):
        load_adapter(folder, new_model(base, 1, "legacy"))


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
        ({"spec": {**asdict(TINY), "num_tokens": 0}}, "spec.num_tokens is 0"),
        ({"spec": {**asdict(TINY), "shortcut": 1}}, "spec.shortcut is 1, expected true or false"),
        ({"spec": {**asdict(TINY), "base": None}}, "spec.base is None, expected a text"),
        ({"spec": {**asdict(TINY), "hooked": [1]}}, "spec.hooked is [1]"),
        ({"spec": {**asdict(TINY), "depth_2": 1}}, "spec.depth_2 is a field that this version"),
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
            "narrow.safetensors",
            lambda path: save_file(
                {
                    "image_proj.norm.weight": torch.zeros(512),
                    "FacialEncoder.a": torch.zeros(1),
                    "adapter_modules.a": torch.zeros(1),
                },
                path,
            ),
            "ID tokens are 512 wide",
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


def test_an_adapter_that_cannot_be_written_leaves_the_earlier_one(
    base: BaseModels, folder: Path
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(TypeError, match="JSON"):
        save_adapter(new_model(base, 2), folder, {"step": object()})
    shared = torch.zeros(1)
    with pytest.raises(RuntimeError, match="share memory"):
        save_adapter(new_model(base, 2), folder, state={"a": shared, "b": shared})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_trained_unet_is_saved_without_the_adapter(
    base: BaseModels, tiny_base: Path, tmp_path: Path
) -> None:
    new_model(base, 1)
    with torch.no_grad():
        base.unet.conv_in.bias += 1
    save_unet(base.unet, tmp_path / "unet")
    assert not [
        key
        for key in load_file(next((tmp_path / "unet").glob("*.safetensors")))
        if "processor" in key
    ]
    again = load_base(TINY, tiny_base, unet=tmp_path / "unet").unet
    assert isinstance(again, UNet2DConditionModel)
    assert torch.equal(again.conv_in.bias, base.unet.conv_in.bias)


def test_a_model_on_the_wrong_base_is_an_error(base: BaseModels) -> None:
    with pytest.raises(WeightsError, match="768 wide"):
        ConsistentID(SPECS["sd15"], base.unet, "legacy")
