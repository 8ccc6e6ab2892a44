"""bench.inference: both orders of work make the same image of the tiny model, and the table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.bases import make_adapter
from bench.inference import Task, measure, summarised, table
from bench.portraits import SECTIONS, Setup
from bench.synthetic_person import synthetic_person
from model.checkpoint import read_adapter


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    (folder / "base").symlink_to(tiny_base)
    make_adapter(folder / "adapter", "tiny", "legacy", "w600k_mbf")
    return folder


def test_the_orders_of_work_make_the_same_image(folder: Path, tmp_path: Path) -> None:
    setup = Setup(
        model="tiny",
        folder=folder,
        photo=synthetic_person(),
        size=(32, 32),
        device="cpu",
        dtype=torch.float32,
    )
    results = {
        order: measure(
            Task(
                order=order,
                setup=setup,
                identity=tmp_path / "identity.safetensors",
                steps=3,
                images=1,
                batches=1,
                threads=0,
            )
        )
        for order in ("reference", "ours", "saved")
    }
    images = {order: result.pop("image") for order, result in results.items()}
    assert images["reference"].shape == (32, 32, 3) and images["reference"].std() > 0.01
    for order in ("ours", "saved"):
        assert np.abs(images["reference"] - images[order]).max() < 1e-4, order

    warm = {order: result["warm"][0] for order, result in results.items()}
    assert all(warm["reference"][name] > 0 for name in SECTIONS)
    assert not any(warm["ours"][name] for name in ("photograph", "image encoder"))
    assert results["saved"]["cold"]["image encoder"] == 0 < results["ours"]["cold"]["image encoder"]
    assert 0 < warm["ours"]["first step"] < warm["ours"]["total"]
    lines = list(table({order: summarised([result]) for order, result in results.items()}))
    assert len({line.count("|") for line in lines}) == 1
    assert any(line.startswith("| warm: end to end |") for line in lines)


def test_an_adapter_of_random_weights_is_complete_and_not_trivial(folder: Path) -> None:
    adapter = read_adapter(folder / "adapter")
    assert adapter.mode == "legacy" and adapter.embedder is not None
    assert all(value.isfinite().all() and value.any() for value in adapter.state.values())
