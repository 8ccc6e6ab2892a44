"""Starting a training from an adapter file: the loaded weights, and the message about them."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from configs.errors import WeightsError
from model.checkpoint import read_adapter
from model.consistentid import BaseModels, ConsistentID, part_of
from model.forms import write_ip_adapter, write_published
from model.spec import PUBLISHED_EMBEDDER, SPECS, Embedder
from model.start import load_start

TINY = SPECS["tiny"]
OTHERS = Embedder(name="w600k_mbf", sha256="9c" * 32)


def copied(model: ConsistentID) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: ConsistentID) -> Counter[str]:
    """Counts by part the weights that differ."""
    after = model.state_dict()
    return Counter(part_of(key) for key in before if not torch.equal(before[key], after[key]))


@pytest.fixture
def model(base: BaseModels) -> ConsistentID:
    """A model in which nothing has the weights of the saved adapter."""
    model = ConsistentID(TINY, base.unet, "corrected")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("name", ["start.bin", "start.safetensors"])
def test_of_an_ip_adapter_all_but_the_facial_encoder_is_taken(
    saved_adapter: Path, model: ConsistentID, tmp_path: Path, name: str
) -> None:
    adapter, before = read_adapter(saved_adapter), copied(model)
    write_ip_adapter(adapter, tmp_path / name)
    text = load_start(tmp_path / name, model)
    after = model.state_dict()
    for key, value in adapter.state.items():
        taken = part_of(key) != "facial_encoder"
        assert torch.equal(after[key], value if taken else before[key])
    count = Counter(map(part_of, after))
    assert changed(before, model) == Counter({**count, "facial_encoder": 0})
    assert f"projector       {count['projector']} of {count['projector']}\n" in text
    assert f"facial_encoder  0 of {count['facial_encoder']}; the others start at" in text
    assert "not used" not in text


def test_what_does_not_fit_is_left_and_named(
    saved_adapter: Path, base: BaseModels, model: ConsistentID, tmp_path: Path
) -> None:
    write_ip_adapter(read_adapter(saved_adapter), tmp_path / "start.bin")
    unet = deepcopy(base.unet)
    smaller = ConsistentID(replace(TINY, lora_rank=8), unet, "corrected")
    before = copied(smaller)
    text = load_start(tmp_path / "start.bin", smaller)
    assert changed(before, smaller)["lora"] == 0 and changed(before, smaller)["projector"] > 0
    lora = sum(part_of(key) == "lora" for key in before)
    assert f"lora            0 of {lora}; the others" in text
    assert f"{lora} in the file are not used, the first is adapter_modules.0.to_k_lora.down" in text
    assert "of shape (16, " in text and "expected (8, " in text


def test_an_ip_adapter_of_which_nothing_fits_is_refused(
    model: ConsistentID, tmp_path: Path
) -> None:
    weights = {"image_proj.proj.weight": torch.zeros(3072, 1024), "ip_adapter.1.a": torch.zeros(2)}
    save_file(weights, tmp_path / "plain.safetensors")
    with pytest.raises(WeightsError, match=r"none of this IP-Adapter's .* no such weight"):
        load_start(tmp_path / "plain.safetensors", model)


def test_of_an_adapter_everything_is_taken(
    saved_adapter: Path, base: BaseModels, model: ConsistentID, tmp_path: Path
) -> None:
    text = load_start(saved_adapter, model, OTHERS)
    assert "the others" not in text and "embeddings" not in text
    assert not changed(read_adapter(saved_adapter).state, model)  # type: ignore[arg-type]

    write_published(read_adapter(saved_adapter), tmp_path / "published.bin")
    with pytest.raises(WeightsError, match=r"set model\.mode=legacy"):
        load_start(tmp_path / "published.bin", model)
    legacy = ConsistentID(TINY, deepcopy(base.unet), "legacy")
    text = load_start(tmp_path / "published.bin", legacy, OTHERS)
    assert "embeddings of w600k_r50; those of the data are of w600k_mbf" in text
    assert "embeddings" not in load_start(tmp_path / "published.bin", legacy, PUBLISHED_EMBEDDER)
