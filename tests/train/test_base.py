"""The tiny base that a run makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch

from configs.training import ModelConfig
from model.pixels import training_pixels
from model.spec import SPECS
from tests.train.helpers import small
from train.base import ensure_base, fit_vae
from train.mixture import Mixture

SIDE = 16  # pixels


def encoded(base: Path, mixture: Mixture) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns images, their scaled latents, and the images decoded from these."""
    images = torch.stack([training_pixels(record, SIDE) for record in mixture.records(range(8))])
    vae = diffusers.AutoencoderKL.from_pretrained(base / "vae")
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
        return images, latents * vae.config.scaling_factor, vae.decode(latents).sample


@pytest.mark.slow
def test_the_tiny_base_is_made_once_and_decodes_its_latents(
    data: Path, mixture: Mixture, tmp_path: Path
) -> None:
    config = replace(
        small(data, Path(), tmp_path / "out"), resolution=SIDE, model=ModelConfig(spec="tiny")
    )
    messages: list[str] = []
    base = Path(ensure_base(config, SPECS["tiny"], mixture, messages.append))
    assert base == tmp_path / "out/base" and "random weights" in messages[0]
    images, latents, decoded = encoded(base, mixture)
    mean_colour = images.mean((2, 3), keepdim=True)
    assert (decoded - images).abs().mean() < 0.2 * (mean_colour - images).abs().mean()
    assert latents.std() == pytest.approx(1.0, abs=0.05)
    before = (base / "vae/diffusion_pytorch_model.safetensors").read_bytes()
    assert ensure_base(config, SPECS["tiny"], mixture, messages.append) == str(base)
    assert len(messages) == 1
    assert (base / "vae/diffusion_pytorch_model.safetensors").read_bytes() == before


def test_fitting_twice_gives_the_same_bytes(
    tiny_base: Path, mixture: Mixture, tmp_path: Path
) -> None:
    import shutil

    files = []
    for name in ("one", "two"):
        shutil.copytree(tiny_base, tmp_path / name)
        fit_vae(tmp_path / name, mixture, resolution=64, seed=1, steps=2)
        files.append((tmp_path / name / "vae/diffusion_pytorch_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_a_named_base_is_used_unchanged(data: Path, mixture: Mixture, tmp_path: Path) -> None:
    config = small(data, Path("/some/base"), tmp_path / "out")
    assert ensure_base(config, SPECS["tiny"], mixture, print) == "/some/base"
    public = replace(config, model=ModelConfig(spec="sd15"))
    assert ensure_base(public, SPECS["sd15"], mixture, print) == SPECS["sd15"].base
