import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from configs.errors import WeightsError
from model.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_adapter,
    read_adapter,
    save_adapter,
    save_unet,
)
from model.consistentid import BaseModels, ConsistentID, load_base
from model.spec import SPECS, ModelSpec

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
    assert load_adapter(tmp_path, two)["step"] == 7
    assert same(one, two)
    assert {key.partition(".")[0] for key in load_file(tmp_path / WEIGHTS_FILE)} == {
        "image_proj_model",
        "adapter_modules",
        "FacialEncoder",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


@pytest.mark.parametrize("projector", ["image_proj", "image_proj_model"])
def test_published_bin_loads_under_either_name(
    base: BaseModels, tmp_path: Path, projector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = replace(TINY, base="someone/some-base")
    monkeypatch.setitem(SPECS, "tiny", published)
    one, two = new_model(base, 1, "legacy"), new_model(base, 2, "legacy")
    torch.save(nested(one, projector), tmp_path / "ConsistentID-v1.bin")
    adapter = read_adapter(tmp_path / "ConsistentID-v1.bin")
    assert (adapter.mode, adapter.spec) == ("legacy", published)
    load_adapter(adapter, two)
    assert same(one, two)


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


def test_the_error_names_keys_that_do_not_fit(base: BaseModels, tmp_path: Path) -> None:
    model = new_model(base, 1)
    save_adapter(model, tmp_path)
    state = load_file(tmp_path / WEIGHTS_FILE)
    del state["image_proj_model.norm.bias"]
    state["FacialEncoder.extra"] = torch.zeros(1)
    state["image_proj_model.norm.weight"] = torch.zeros(3)
    save_file(state, tmp_path / WEIGHTS_FILE)
    with pytest.raises(WeightsError) as caught:
        load_adapter(tmp_path, model)
    for part in (
        "1 missing (image_proj_model.norm.bias)",
        "1 unexpected (FacialEncoder.extra)",
        "1 mis-shaped",
    ):
        assert part in str(caught.value)


def test_the_other_mode_is_refused(base: BaseModels, tmp_path: Path) -> None:
    save_adapter(new_model(base, 1, "corrected"), tmp_path)
    with pytest.raises(WeightsError, match="corrected mode"):
        load_adapter(tmp_path, new_model(base, 1, "legacy"))


def test_broken_and_foreign_files_are_errors(base: BaseModels, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no adapter there"):
        read_adapter(tmp_path / "nothing.bin")
    for name in ("cut.bin", "cut.safetensors"):
        (tmp_path / name).write_bytes(b"\x80\x02 not weights")
        with pytest.raises(WeightsError):
            read_adapter(tmp_path / name)
    save_file({"unet.conv.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="holds unet"):
        read_adapter(tmp_path / "other.safetensors")
    save_adapter(new_model(base, 1), tmp_path / "newer")
    config = json.loads((tmp_path / "newer" / CONFIG_FILE).read_text())
    (tmp_path / "newer" / CONFIG_FILE).write_text(json.dumps({**config, "format": 99}))
    with pytest.raises(WeightsError, match="format 99"):
        read_adapter(tmp_path / "newer")


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
