from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import WeightsError
from model.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    build_adapter,
    load_adapter,
    read_adapter,
    save_adapter,
)
from model.consistentid import BaseModels, ConsistentID, predict_noise
from model.spec import PUBLISHED_EMBEDDER, SPECS, Embedder, ModelSpec
from stages.backends.weights import WEIGHTS

TINY = SPECS["tiny"]


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
    expected = Embedder(name="w600k_mbf", sha256="9c" * 32)
    assert read_adapter(folder).embedder == read_adapter(folder / WEIGHTS_FILE).embedder == expected
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
    assert adapter.state["image_proj_model.norm.weight"].max() == 1


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


def test_a_model_on_the_wrong_base_is_an_error(base: BaseModels) -> None:
    with pytest.raises(WeightsError, match="768 wide"):
        ConsistentID(SPECS["sd15"], base.unet, "legacy")
