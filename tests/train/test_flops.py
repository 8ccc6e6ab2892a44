"""Counting the operations of a training step, and the share of a GPU's peak in the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configs.training import TrainConfig, TrainedConfig
from model.consistentid import BaseModels, load_base, predict_noise
from model.spec import SPECS
from tests.train.helpers import run, small
from train import report
from train.flops import peak_flops, sample_flops
from train.segments import read_segments
from train.setup import make_models

SPEC = SPECS["tiny"]


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> BaseModels:
    return load_base(SPEC, tiny_base)


def config_of(base: Path, **changes: Any) -> TrainConfig:
    return small(base, base, base, **changes)  # no data is read, nothing is written


@pytest.mark.parametrize("part", ["full", "paper", "lora"])
def test_the_operations_are_those_of_a_real_pass_and_checkpointing_adds_none(
    tiny_base: Path, base: BaseModels, part: Any
) -> None:
    train = TrainedConfig(parts=(part,))
    config = config_of(tiny_base, gradient_checkpointing=True, train=train)
    _, trained = make_models(config, SPEC, str(tiny_base), torch.device("cpu"))
    before = torch.random.get_rng_state()
    counted = sample_flops(config, SPEC, base)
    assert torch.equal(torch.random.get_rng_state(), before)

    def really(samples: int) -> int:
        states = torch.randn(samples, 81, SPEC.cross_attention_dim)
        states.requires_grad_(part != "lora")  # of the projector and the facial encoder
        times = torch.zeros(samples, dtype=torch.long)
        # of torch's fused attention on CPUs, the counter knows no operations
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            noisy = torch.randn(samples, 4, 8, 8)
            predict_noise(trained.unet, noisy, times, states)[0].sum().backward()
        return int(counter.get_total_flops())

    again = really(1)
    trained.unet.disable_gradient_checkpointing()
    assert counted == really(1) and again > 1.2 * counted
    assert 3 * counted == really(3)


def test_a_larger_image_takes_more_operations_and_fewer_trained_parts_fewer(
    tiny_base: Path, base: BaseModels
) -> None:
    counted = sample_flops(config_of(tiny_base), SPEC, base)
    large = sample_flops(config_of(tiny_base, resolution=64), SPEC, base)
    assert 3 * counted < large < 8 * counted
    projector = config_of(tiny_base, train=TrainedConfig(parts=("projector",)))
    assert sample_flops(projector, SPEC, base) < counted


def test_the_report_tells_how_many_and_the_share_of_the_peak(
    data: Path, tiny_base: Path, base: BaseModels, tmp_path: Path
) -> None:
    config = small(data, tiny_base, tmp_path / "run", max_train_steps=2)
    run(config)
    (segment,) = read_segments(tmp_path / "run")
    assert segment.sample_flops == sample_flops(config, SPEC, base)
    page = (tmp_path / "run" / report.REPORT).read_text()
    assert f"takes {segment.sample_flops / 1e12:.3g} TFLOP" in page
    assert "utilisation" not in page  # the peak of a CPU isn't known

    settings = {**segment.settings, "mixed_precision": "bf16"}
    gpu: dict[str, Any] = {"device": "NVIDIA H200", "settings": settings, "processes": 2}
    gpu["sample_flops"] = 2 * 10**12
    times = [{"step": step, "steps": 5, "samples": 32, "seconds": 0.25} for step in (5, 10)]
    text = report._flops(replace(segment, **gpu), times)
    assert "256 TFLOP/s, which is 13% of the peak of 2 × NVIDIA H200 (1,978 TFLOP/s)" in text
    assert report._flops(replace(segment, step=10, **gpu), times) == ""  # no step since the start
    assert report._flops(replace(segment, sample_flops=0), times) == ""  # of an older version


def test_the_peak_is_known_by_the_name_of_a_gpu_for_half_precision() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == peak_flops("NVIDIA H200", "fp16") > 9e14
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA H100 NVL", "bf16") == peak_flops("NVIDIA H200 NVL", "bf16") == 835e12
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16") == 0
    assert peak_flops("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16") == 0
    assert peak_flops("NVIDIA H200", "no") == peak_flops("cpu", "bf16") == 0
