"""An adapter with random weights, and settings for few steps and small portraits."""

from __future__ import annotations

from pathlib import Path

import torch

from configs.portraits import InferConfig
from model.checkpoint import save_adapter
from model.consistentid import ConsistentID
from model.spec import SPECS
from stages.backends.weights import Weights
from stages.regions import Mode
from tests.bases import base_copy


def write_adapter(base: Path, folder: Path, mode: Mode) -> Path:
    """Writes an adapter with random weights, also in the half of the LoRA that starts at zero.

    So every part of it changes the result.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = ConsistentID(SPECS["tiny"], base_copy(SPECS["tiny"], base).unet, mode)
        for name, value in model.named_parameters():
            if name.endswith("up.weight"):
                torch.nn.init.normal_(value, std=0.05)
    embedder = {"name": "w600k_mbf", "sha256": Weights().digest("w600k_mbf")}
    return save_adapter(model, folder, {"step": 0, "embedder": embedder})


def small(adapter: Path, **changes: object) -> InferConfig:
    """Returns settings for four steps at 32 pixels."""
    values: dict[str, object] = {
        "adapter": str(adapter),
        "num_inference_steps": 4,
        "start_merge_step": 2,
        "height": 32,
        "width": 32,
        "guidance_scale": 2.0,
        "negative_prompt": "blurry",
        "merge_lora": False,
        "seed": 5,
    }
    return InferConfig(**{**values, **changes})  # type: ignore[arg-type]
