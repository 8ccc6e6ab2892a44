"""The base that a run takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from configs.training import ModelConfig
from model.spec import SPECS
from tests.train.helpers import small
from train.base import ensure_base


def test_the_tiny_base_is_made_once(data: Path, tmp_path: Path) -> None:
    config = replace(small(data, Path(), tmp_path / "out"), model=ModelConfig(spec="tiny"))
    messages: list[str] = []
    base = Path(ensure_base(config, SPECS["tiny"], messages.append))
    assert base == tmp_path / "out/base" and "random weights" in messages[0]
    weights = base / "vae/diffusion_pytorch_model.safetensors"
    before = weights.stat().st_mtime_ns
    assert ensure_base(config, SPECS["tiny"], messages.append) == str(base)
    assert len(messages) == 1 and weights.stat().st_mtime_ns == before


def test_a_named_base_is_used_unchanged(data: Path, tmp_path: Path) -> None:
    config = small(data, Path("/some/base"), tmp_path / "out")
    assert ensure_base(config, SPECS["tiny"], print) == "/some/base"
    public = replace(config, model=ModelConfig(spec="sd15"))
    assert ensure_base(public, SPECS["sd15"], print) == SPECS["sd15"].base
