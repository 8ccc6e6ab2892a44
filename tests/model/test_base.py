"""The base and the adapter that come with the project."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch

from configs.errors import WeightsError
from model.base import FOLDER, adapter_path, base_path, check_files, write_file_list
from model.checkpoint import read_adapter
from model.spec import SPECS


def test_the_name_small_means_the_shipped_folders_and_other_names_stay() -> None:
    assert base_path("small") == str(FOLDER / "base")
    assert adapter_path("small") == str(FOLDER / "adapter")
    assert base_path("runs/base/base") == adapter_path("runs/base/base") == "runs/base/base"
    assert read_adapter(Path(adapter_path("small"))).spec == SPECS["small"]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "small"))


def test_a_changed_file_is_named(copied: Path) -> None:
    check_files(copied)
    check_files.cache_clear()
    path = copied / "base/unet/diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"unet/diff.*sha256 .*, expected .*git checkout"):
        check_files(copied)
    write_file_list(copied)
    check_files(copied)


def test_a_missing_file_and_a_missing_list_are_named(copied: Path) -> None:
    (copied / "adapter/adapter.json").unlink()
    with pytest.raises(WeightsError, match=r"adapter\.json is missing"):
        check_files(copied)
    (copied / "files.json").unlink()
    with pytest.raises(WeightsError, match=r"files\.json can't be read"):
        check_files(copied)


def test_every_file_is_listed_and_the_weights_are_half_precision_and_at_most_24_mb() -> None:
    listed = json.loads((FOLDER / "files.json").read_text())
    present = {p.relative_to(FOLDER).as_posix() for p in FOLDER.rglob("*") if p.is_file()}
    assert present == {*listed, "files.json", "README.md", "metrics.json"}
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.safetensors")) <= 24e6


def test_stock_diffusers_draws_with_the_base() -> None:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER / "base")
    assert pipe.unet.config.sample_size * pipe.vae_scale_factor == 64
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    [image] = pipe("A portrait of a person.", num_inference_steps=2, generator=generator).images
    assert image.size == (64, 64)
