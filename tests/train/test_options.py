"""Options of training: what each of them changes."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from typer.testing import CliRunner

from configs.errors import ConfigError
from configs.load import dump
from configs.training import LossConfig, ModelConfig, OptimConfig, TrainConfig
from model.pixels import size_condition
from model.spec import SPECS
from stages.record import Record
from tests.train.helpers import Parts, run, small
from train.cli import app
from train.data import TrainBatch
from train.history import read_lines
from train.mixture import Mixture
from train.setup import check_mps
from train.step import frozen_features, noised_latents
from train.texts import empty_text_ids

NO_DROPS = LossConfig(drop_text=0, drop_identity=0, drop_both=0)


def batch_of(
    mixture: Mixture, data: Path, base: Path, count: int, **loss: float
) -> tuple[Parts, TrainBatch]:
    """Returns the models and the first samples of a run with these settings of the loss."""
    config = small(data, base, data / "none", loss=replace(NO_DROPS, **loss))
    parts = Parts(config, mixture)
    return parts, parts.make(range(count))


def test_a_noise_offset_is_one_number_for_each_channel_of_a_sample(
    mixture: Mixture, data: Path, tiny_base: Path
) -> None:
    _, plain = batch_of(mixture, data, tiny_base, 64)
    _, offset = batch_of(mixture, data, tiny_base, 64, noise_offset=0.1)
    added = offset.noise - plain.noise
    torch.testing.assert_close(added, added.mean((2, 3), keepdim=True).expand_as(added))
    means = added.mean((2, 3)).flatten()
    assert float(means.std()) == pytest.approx(0.1, rel=0.2) and abs(float(means.mean())) < 0.03
    assert torch.equal(offset.added_noise, offset.noise)  # it is to be predicted


def test_an_input_perturbation_is_added_and_not_to_be_predicted(
    mixture: Mixture, data: Path, tiny_base: Path
) -> None:
    parts, plain = batch_of(mixture, data, tiny_base, 16)
    _, perturbed = batch_of(mixture, data, tiny_base, 16, input_perturbation=0.1)
    assert torch.equal(perturbed.noise, plain.noise)
    assert float((perturbed.added_noise - plain.noise).std()) == pytest.approx(0.1, rel=0.1)
    noisy, target = noised_latents(parts.frozen, perturbed)
    before, expected = noised_latents(parts.frozen, plain)
    assert torch.equal(target, expected) and not torch.equal(noisy, before)


def test_a_dropped_region_leaves_its_noun_the_texts_token(
    mixture: Mixture, data: Path, tiny_base: Path
) -> None:
    parts, whole = batch_of(mixture, data, tiny_base, 64)
    _, batch = batch_of(mixture, data, tiny_base, 64, drop_region=0.3)
    dropped = whole.token_valid & ~batch.token_valid
    share = float(dropped.sum() / whole.token_valid.sum())
    assert 0.2 < share < 0.4 and not (batch.token_valid & ~whole.token_valid).any()
    # each by itself: some samples lose one region and keep another
    assert (dropped.any(1) & batch.token_valid.any(1)).any()
    assert torch.equal(batch.token_mask.sum(1), batch.token_valid.sum(1))
    assert (batch.region_masks[dropped] == 0).all()
    assert torch.equal(batch.identity, whole.identity) and torch.equal(
        batch.input_ids, whole.input_ids
    )
    features = frozen_features(parts.frozen, batch)
    states = parts.trained.adapter.prepare(features)
    sample, slot = (int(each[0]) for each in dropped.nonzero(as_tuple=True))
    noun = int(whole.token_idx[sample, slot])
    assert torch.equal(states[sample, noun], features.text_hidden[sample, noun])
    remaining = int(whole.token_idx[batch.token_valid][0])
    first = int(batch.token_valid.any(1).nonzero()[0])
    assert not torch.equal(states[first, remaining], features.text_hidden[first, remaining])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("corrected", [300, 400, 0, 5, 32, 32]), ("legacy", [300, 400, 0, 0, 32, 32])],
)
def test_sizes_of_sdxl_are_those_of_the_source_and_of_the_crop(
    mode: Any, expected: list[int]
) -> None:
    record = Record(
        key="0" * 20, source="a", width=128, height=96, source_width=400, source_height=300
    )
    assert size_condition(record, 32, mode).tolist() == expected
    unknown = replace(record, source_width=0, source_height=0)
    assert size_condition(unknown, 32, "corrected").tolist() == [96, 128, 0, 5, 32, 32]


def test_sizes_may_be_fixed(mixture: Mixture, data: Path, tiny_base: Path) -> None:
    for sizes in ("true", "fixed"):
        model = ModelConfig(spec="tiny", base=str(tiny_base), device="cpu", sizes=sizes)  # type: ignore[arg-type]
        parts = Parts(small(data, tiny_base, data / "none", model=model), mixture)
        rows = {tuple(row) for row in parts.make(range(8)).sizes.tolist()}
        assert (rows == {(32, 32, 0, 0, 32, 32)}) == (sizes == "fixed")
        assert all(row[4:] == (32, 32) for row in rows)


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in read_lines(output / "losses.jsonl")]


@pytest.fixture
def few_blocks(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny base with two transformer blocks, since each takes seconds to compile. The losses
    read the scores of one.
    """
    import diffusers

    spec = replace(SPECS["tiny"], hooked=("down_blocks.0",))
    monkeypatch.setitem(SPECS, "tiny", spec)
    base = tmp_path / "few-blocks"
    base.mkdir()
    for part in tiny_base.iterdir():
        if part.name != "unet":
            (base / part.name).symlink_to(part)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        diffusers.UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(48, 48),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=spec.cross_attention_dim,
            attention_head_dim=4,  # diffusers' name for the number of heads
            norm_num_groups=16,
        ).save_pretrained(base / "unet")
    return base


def test_faster_arrangements_change_no_more_than_the_last_digits(
    data: Path, few_blocks: Path, tmp_path: Path
) -> None:
    run(small(data, few_blocks, tmp_path / "plain", max_train_steps=3))
    for changes in (
        {"channels_last": True},
        {"compile": "aot_eager", "gradient_checkpointing": True},
    ):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        output = tmp_path / "-".join(changes)
        run(small(data, few_blocks, output, max_train_steps=3, **changes))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert (graphs > 0) == ("compile" in changes)
        assert losses(output) == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_channels_last_is_the_order_of_the_weights(
    mixture: Mixture, data: Path, tiny_base: Path
) -> None:
    parts = Parts(small(data, tiny_base, data / "none", channels_last=True), mixture)
    weight = parts.trained.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_adamw8bit_has_moments_of_one_byte(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    optim = OptimConfig(learning_rate=1e-3, lr_scheduler="constant", optimizer="adamw8bit")
    config = small(
        data, tiny_base, tmp_path / "run", optim=optim, max_train_steps=4, checkpointing_steps=2
    )
    run(config)
    path = tmp_path / "run/checkpoint-000004/state.pt"
    state = torch.load(path, weights_only=True)["optimizer"]["state"]
    moments = [
        values["state1"]
        for each in state.values()
        if "state1" in (values := each.get("__bnb_optimizer_quant_state__", {}))
    ]
    assert any(each.dtype == torch.uint8 for each in moments)
    plain = replace(optim, optimizer="adamw")
    run(replace(config, optim=plain, output=str(tmp_path / "plain")))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=0.02)
    # resumed to the same losses
    resumed = replace(
        config,
        output=str(tmp_path / "resumed"),
        resume_from_checkpoint=str(tmp_path / "run/checkpoint-000002"),
    )
    run(resumed)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "run")


def test_a_dry_run_takes_two_steps_and_leaves_nothing(
    data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    dump(small(data, tiny_base, tmp_path / "out", max_train_steps=1000), tmp_path / "preset.yaml")
    result = CliRunner().invoke(app, ["run", "-c", str(tmp_path / "preset.yaml"), "--dry-run"])
    assert result.exit_code == 0, result.output
    for text in ("parameters train", "samples/s", "GB of this process", "1,000 steps would take"):
        assert text in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("has_mps", "device", "precision", "error"),
    [
        (False, "mps", "no", r"model\.device=mps, but torch finds no"),
        (True, "mps", "bf16", r"mixed_precision=bf16: on GPUs of Apple, training needs float32"),
        (True, "auto", "fp16", r"mixed_precision=fp16: on GPUs of Apple, training needs float32"),
        (True, "mps", "no", ""),
        (True, "cpu", "bf16", ""),
        (False, "auto", "bf16", ""),
    ],
)
def test_gpus_of_apple_train_in_float32(
    has_mps: bool, device: str, precision: Any, error: str
) -> None:
    config = TrainConfig(model=ModelConfig(spec="tiny", device=device), mixed_precision=precision)
    with pytest.raises(ConfigError, match=error) if error else nullcontext():
        check_mps(config, is_available=has_mps)


def test_drop_rates_must_leave_something() -> None:
    loss = LossConfig(drop_text=0.5, drop_identity=0.46)
    with pytest.raises(ConfigError, match=r"loss\.drop_\* add up to 1\.01"):
        TrainConfig(loss=loss)
    legacy = TrainConfig(loss=loss, model=ModelConfig(mode="legacy"))  # there is one rate only
    assert legacy.loss.drops(legacy=True) == (0, 0, 0.1)


@pytest.mark.parametrize(("mode", "share"), [("corrected", 0.05), ("legacy", 0.1)])
def test_legacy_drops_text_and_photograph_as_often_as_the_reference(
    mode: Literal["corrected", "legacy"],
    share: float,
    mixture: Mixture,
    data: Path,
    tiny_base: Path,
) -> None:
    model = ModelConfig(spec="tiny", base=str(tiny_base), device="cpu", mode=mode)
    loss = LossConfig(drop_text=0, drop_identity=0)
    parts = Parts(small(data, tiny_base, data / "none", loss=loss, model=model), mixture)
    assert parts.preparation.drop.both == share
    batch = parts.make(range(512))
    dropped = (batch.input_ids == empty_text_ids(parts.frozen.base.tokenizer)[0]).all(1)
    assert float(dropped.float().mean()) == pytest.approx(share, abs=0.035)
