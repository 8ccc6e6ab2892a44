"""Fixtures: adapters over the tiny base, a generator with one of them, and two people."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.schema import InferConfig
from infer.generator import ConsistentIDGenerator
from infer.identity import Identity
from infer.load import load_generator
from model.checkpoint import save_adapter
from model.consistentid import ConsistentID, load_base
from model.spec import SPECS
from stages.regions import Mode


def write_adapter(base: Path, folder: Path, mode: Mode) -> Path:
    """Writes an adapter with random weights, also in the half of the LoRA that starts at zero.

    So every part of it changes the result.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = ConsistentID(SPECS["tiny"], load_base(SPECS["tiny"], base).unet, mode)
        for name, value in model.named_parameters():
            if name.endswith("up.weight"):
                torch.nn.init.normal_(value, std=0.05)
    return save_adapter(model, folder, {"step": 0})


@pytest.fixture(scope="session")
def adapter(tiny_base: Path) -> Path:
    """An adapter in OUT/final with its base in OUT/base, as a training run writes them."""
    return write_adapter(tiny_base, tiny_base.parent / "final", "corrected")


@pytest.fixture(scope="session")
def legacy_adapter(tiny_base: Path) -> Path:
    return write_adapter(tiny_base, tiny_base.parent / "legacy", "legacy")


def small(adapter: Path, **changes: object) -> InferConfig:
    """Returns settings for four steps at 64 pixels."""
    values: dict[str, object] = {
        "adapter": str(adapter),
        "num_inference_steps": 4,
        "start_merge_step": 2,
        "height": 64,
        "width": 64,
        "guidance_scale": 2.0,
        "negative_prompt": "blurry",
        "merge_lora": False,
        "seed": 5,
    }
    return InferConfig(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def generator(adapter: Path) -> ConsistentIDGenerator:
    return load_generator(small(adapter))


@pytest.fixture(scope="session")
def photo(portraits: Path) -> Path:
    return sorted(portraits.glob("*.jpg"))[0]


@pytest.fixture(scope="session")
def person(generator: ConsistentIDGenerator, photo: Path) -> Identity:
    return generator.identity(photo)


@pytest.fixture(scope="session")
def stranger(generator: ConsistentIDGenerator, portraits: Path) -> Identity:
    return generator.identity(sorted(portraits.glob("*.jpg"))[1])
