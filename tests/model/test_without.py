"""Adapters that lack parts: their weights, what they compute, their files, their other forms."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from configs.errors import WeightsError
from model.attention import merge_lora, unmerge_lora
from model.checkpoint import (
    CONFIG_FILE,
    PREFIXES,
    WEIGHTS_FILE,
    build_adapter,
    load_adapter,
    read_adapter,
    save_adapter,
)
from model.consistentid import BaseModels, ConsistentID, Features, predict_noise
from model.convert import Form, convert
from model.spec import PARTS, SPECS, ModelSpec

TINY = SPECS["tiny"]
FACEID = replace(TINY, projector_depth=4, identity_hidden=1024, dim_head=64)
KEYS = {
    "projector": ("image_proj_model.", ".to_k_ip.", ".to_v_ip."),
    "facial_encoder": ("FacialEncoder.",),
    "lora": ("_lora.",),
}
LATENTS = (torch.randn(2, 4, 8, 8), torch.tensor([7, 501]))


def without(*parts: str, spec: ModelSpec = TINY) -> ModelSpec:
    return replace(spec, without=parts)


def adapter_on(unet: Any, spec: ModelSpec) -> ConsistentID:
    """An adapter in which nothing is zero; weights of equal names are equal whatever it lacks."""
    model = ConsistentID(spec, unet, "corrected")
    with torch.no_grad():
        for name, value in model.named_parameters():
            torch.manual_seed(len(name) + sum(name.encode()))
            value.normal_(std=0.1)
    return model.requires_grad_(False).eval()


def random_features() -> Features:
    mask = torch.zeros(2, 77, dtype=torch.bool)
    mask[:, 3:5] = True
    return Features(
        text_hidden=torch.randn(2, 77, 128),
        pooled=None,
        clip_hidden=torch.randn(2, 50, 96),
        region_hidden=torch.randn(2, 5, 50, 96),
        identity=torch.randn(2, 512),
        token_mask=mask,
        token_valid=torch.tensor([[True, True, False, False, False]] * 2),
    )


@pytest.mark.parametrize("lacking", [PARTS[:1], PARTS[1:], PARTS[::2]])
def test_what_is_left_out_has_no_weights_and_the_file_states_it(
    base: BaseModels, tmp_path: Path, lacking: tuple[str, ...]
) -> None:
    whole = {*adapter_on(deepcopy(base.unet), TINY).state_dict()}
    model = adapter_on(base.unet, without(*lacking))
    left_out = tuple(key for part in lacking for key in KEYS[part])
    expected = {key for key in whole if not any(each in key for each in left_out)}
    assert {*model.state_dict()} == {name for name, _ in model.named_parameters()} == expected
    # one that lacked a parameter would block the other processes of a distributed run
    batch = random_features()
    model.requires_grad_(True)
    predict_noise(base.unet, *LATENTS, model.prepare(batch))[0].sum().backward()
    assert all(each.grad is not None for each in model.parameters())
    save_adapter(model, tmp_path)
    assert {*load_file(tmp_path / WEIGHTS_FILE)} == expected
    adapter = read_adapter(tmp_path)
    assert adapter.spec == model.spec and adapter.spec.without == lacking
    with torch.no_grad():
        noise, _ = predict_noise(base.unet, *LATENTS, model.prepare(batch))
        built = build_adapter(adapter, base.unet, torch.float32, "cpu")
        assert torch.equal(predict_noise(base.unet, *LATENTS, built.prepare(batch))[0], noise)


def test_a_whole_adapter_states_nothing_of_it(base: BaseModels, tmp_path: Path) -> None:
    save_adapter(adapter_on(base.unet, TINY), tmp_path)
    spec = json.loads((tmp_path / CONFIG_FILE).read_text())["spec"]
    assert "without" not in spec and spec.keys() == {*TINY.__slots__} - {"without"}


def test_each_part_that_is_left_out_has_no_effect(base: BaseModels) -> None:
    batch, whole = random_features(), deepcopy(base.unet)
    model = adapter_on(whole, TINY)
    states = model.prepare(batch)

    def noise(unet: Any, states: Tensor) -> Tensor:
        with torch.no_grad():
            return predict_noise(unet, *LATENTS, states)[0]

    def close(one: Tensor, other: Tensor) -> bool:
        return torch.allclose(one, other, atol=1e-4)

    expected = noise(whole, states)
    # regions' nouns keep their text tokens
    unet = deepcopy(base.unet)
    plain = adapter_on(unet, without("facial_encoder")).prepare(batch)
    assert torch.equal(plain[:, :77], batch.text_hidden)
    assert torch.equal(plain[:, 77:], states[:, 77:]) and not torch.equal(plain, states)
    assert close(noise(unet, states), expected)
    # the ID tokens are zero, and as with a scale of 0, nothing is read of them
    unet = deepcopy(base.unet)
    plain = adapter_on(unet, without("projector")).prepare(batch)
    assert torch.equal(plain[:, :77], states[:, :77]) and not plain[:, 77:].any()
    model.set_scale(0)
    assert close(noise(unet, plain), noise(whole, states)) and not close(
        noise(whole, states), expected
    )
    # the attention's projections are the base's: also its output, with a scale of 0
    unet = deepcopy(base.unet)
    adapter_on(unet, without("lora")).set_scale(0)
    assert close(noise(unet, states), noise(base.unet, states[:, :77]))
    assert not close(noise(unet, states), noise(whole, states))
    weights = {name: value.clone() for name, value in unet.state_dict().items()}
    for change in (merge_lora, unmerge_lora):
        change(unet)
        assert all(torch.equal(value, weights[name]) for name, value in unet.state_dict().items())


def test_an_adapter_with_other_parts_is_not_loaded(base: BaseModels, tmp_path: Path) -> None:
    save_adapter(adapter_on(deepcopy(base.unet), without("lora")), tmp_path)
    fault = r"lacks lora, the model lacks no part; set model.without=\[lora\]"
    with pytest.raises(WeightsError, match=fault):
        load_adapter(tmp_path, adapter_on(deepcopy(base.unet), TINY))
    # a file whose statement isn't true
    path = tmp_path / CONFIG_FILE
    config = json.loads(path.read_text())
    for lacking, fault in (
        (["facial_encoder"], f"expected {PREFIXES[0]}, {PREFIXES[2]} .image_proj"),
        (["projector"], f"expected {PREFIXES[1]}, {PREFIXES[2]}, each once"),
        ([], "adapter_modules.0.to_k_lora.down.weight: not given"),
    ):
        path.write_text(json.dumps({**config, "spec": {**config["spec"], "without": lacking}}))
        with pytest.raises(WeightsError, match=fault):
            load_adapter(tmp_path, ConsistentID(without(*lacking), base.unet, "corrected"))


def test_forms_that_cannot_state_what_is_left_out_are_refused(
    base: BaseModels, tmp_path: Path
) -> None:
    for part in ("projector", "lora"):
        model = adapter_on(deepcopy(base.unet), without(part, spec=FACEID))
        source, target = save_adapter(model, tmp_path / part), tmp_path / f"{part}.bin"
        with pytest.raises(WeightsError, match=f"has no {part}, and the published form can't"):
            convert(source, target, Form.PUBLISHED)
        assert not target.exists()
    with pytest.raises(WeightsError, match="no projector, and IP-Adapter's FaceID-Plus form can't"):
        convert(tmp_path / "projector", target, Form.IP_ADAPTER)
    convert(tmp_path / "lora", tmp_path / "again", Form.ADAPTER)
    again, first = (tmp_path / name / WEIGHTS_FILE for name in ("again", "lora"))
    assert again.read_bytes() == first.read_bytes()
    assert read_adapter(again).spec == read_adapter(first).spec
    convert(tmp_path / "lora", target, Form.IP_ADAPTER)
    state, unet = torch.load(target, weights_only=True), deepcopy(base.unet)
    unet._load_ip_adapter_weights([state])  # as diffusers' load_ip_adapter
    assert unet._load_ip_adapter_loras([state]) == {}
    assert not any("lora" in key for key in state["ip_adapter"])
