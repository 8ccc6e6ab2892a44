"""Base models that a process reads once, and a small one whose VAE scales by two."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from configs.base_model import DenoiserConfig
from model.consistentid import BaseModels, load_base
from model.spec import SPECS, ModelSpec


@contextmanager
def read_once(module: ModuleType) -> Iterator[None]:
    """Lets a module that loads bases get copies of models that were read once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_base", base_copy)
        yield


def base_copy(spec: ModelSpec, base: str | Path, **options: Any) -> BaseModels:
    """What `load_base` returns, with copies of models that were read once: no caller sees another's
    changes. Tests never change a base's files.
    """
    models = _base(spec, Path(base).resolve(), **options)
    return replace(models, **{name: copy.deepcopy(part) for name, part in models.modules.items()})


@cache
def _base(spec: ModelSpec, base: Path, **options: Any) -> BaseModels:
    return load_base(spec, base, **options)


def make_small_base(folder: Path, tiny: Path) -> Path:
    """Writes a base of the spec `small` with random weights: its VAE scales by 2, its UNet by 2,
    and its scheduler is that of trained bases. Its image encoder is the tiny base's.
    """
    import diffusers
    import torch
    import transformers

    from train.base_model.denoiser import make_denoiser, make_schedule

    width = SPECS["small"].cross_attention_dim
    for name in ("tokenizer", "image_encoder", "feature_extractor"):
        (folder / name).symlink_to(tiny / name)
    text = transformers.CLIPTextConfig(
        vocab_size=49_408,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=49_406,
        eos_token_id=49_407,
        pad_token_id=49_407,
    )
    settings = DenoiserConfig(channels=(16, 32), heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        transformers.CLIPTextModel(text).save_pretrained(folder / "text_encoder")
        diffusers.AutoencoderKL(
            block_out_channels=(16, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=8,
        ).save_pretrained(folder / "vae")
        make_denoiser(settings, SPECS["small"], 18).save_pretrained(folder / "unet")
    make_schedule(settings).save_pretrained(folder / "scheduler")
    index = json.loads((tiny / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
