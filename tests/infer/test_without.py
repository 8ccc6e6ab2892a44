"""Adapters that lack parts, in a pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from configs.errors import ConfigError
from configs.portraits import RegionStrength
from infer.generate import generate
from infer.identity import Identity
from infer.pipelines import ConsistentIDPipeline
from model.spec import SPECS
from stages.regions import Mode
from tests.infer.helpers import close, contexts, run, small, write_adapter


def with_adapter(
    bare: ConsistentIDPipeline, trained: Path, folder: Path, *parts: str, mode: Mode = "corrected"
) -> ConsistentIDPipeline:
    """Gives the pipeline an adapter without some parts."""
    spec = replace(SPECS["tiny"], without=parts)
    bare.load_consistentid_adapter(write_adapter(trained / "base", folder, mode, spec))
    return bare


def read_by_the_unet(
    pipe: ConsistentIDPipeline, person: Identity
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Returns the latents of a call, and what its first and its last step read, (2, 81, 128)."""
    states, stop = contexts(pipe)
    latents = run(pipe, person, start_merge_step=2)
    stop()
    return latents, (states[0], states[-1])


def test_without_lora_merging_changes_nothing_and_unloading_restores_the_base(
    bare: ConsistentIDPipeline, trained: Path, person: Identity, stranger: Identity, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in bare.unet.state_dict().items()}
    pipe = with_adapter(bare, trained, tmp_path / "adapter", "lora")
    latents = run(pipe, person)
    assert not close(latents, run(pipe, stranger))
    pipe.fuse_consistentid()
    pipe.unfuse_consistentid()
    pipe.fuse_consistentid()
    assert not pipe.adapter.merged and torch.equal(run(pipe, person), latents)
    pipe.unload_consistentid_adapter()
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_without_facial_encoder_both_phases_read_the_same(
    bare: ConsistentIDPipeline, trained: Path, person: Identity, stranger: Identity, tmp_path: Path
) -> None:
    pipe = with_adapter(bare, trained, tmp_path / "adapter", "facial_encoder")
    latents, (first, last) = read_by_the_unet(pipe, person)
    assert torch.equal(first, last)
    assert not close(latents, run(pipe, stranger))
    settings = small(tmp_path / "adapter", prompts=("a",), num_inference_steps=2)
    [portrait] = generate(pipe, person, settings)
    strength = RegionStrength(eyes=0, nose=0)
    changed = replace(settings, start_merge_step=0, region_strength=strength)
    [other] = generate(pipe, person, changed)
    assert (other.pixels == portrait.pixels).all()
    strength = RegionStrength(eyes=0.5)
    with pytest.raises(ConfigError, match=r"eyes: 0\.5; without facial_encoder, expected"):
        next(generate(pipe, person, replace(settings, region_strength=strength)))


@pytest.mark.parametrize("mode", ["corrected", "legacy"])
def test_without_projector_the_id_tokens_are_zero(
    bare: ConsistentIDPipeline, trained: Path, person: Identity, tmp_path: Path, mode: Mode
) -> None:
    person = replace(person, mode=mode)
    pipe = with_adapter(bare, trained, tmp_path / "adapter", "projector", "lora", mode=mode)
    latents, (first, last) = read_by_the_unet(pipe, person)
    assert first.shape == last.shape == (2, 81, 128)
    assert not first[:, 77:].any() and not last[:, 77:].any()
    assert not torch.equal(first[1], last[1])  # regions are fused
    pipe.set_consistentid_scale(0)
    assert torch.equal(run(pipe, person, start_merge_step=2), latents)
    for scale in (0.5, {"identity": 2}):
        with pytest.raises(ConfigError, match=r"identity: .*; without projector, expected 0 or 1"):
            pipe.set_consistentid_scale(scale)
    pipe.set_consistentid_scale({"eyes": 0.5})
    assert not close(run(pipe, person, start_merge_step=2), latents)


def test_of_a_lora_alone_a_person_changes_nothing(
    bare: ConsistentIDPipeline, trained: Path, person: Identity, stranger: Identity, tmp_path: Path
) -> None:
    pipe = with_adapter(bare, trained, tmp_path / "adapter", "projector", "facial_encoder")
    alike = {"face_caption": "a face"}
    latents = run(pipe, person, **alike)
    assert torch.equal(run(pipe, stranger, **alike), latents)
    pipe.fuse_consistentid()
    assert pipe.adapter.merged and close(run(pipe, person, **alike), latents)
