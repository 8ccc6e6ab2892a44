"""The computation of a step: features, noise, losses, and their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from configs.errors import ConfigError
from configs.training import LossConfig
from model.conditions import collate, drop_conditions
from model.consistentid import encode_frozen, predict_noise
from model.spec import TOKEN_LIMIT
from tests.train.helpers import Parts
from train import draws
from train.data import TrainBatch
from train.step import freeze, frozen_features, noised_latents, snr_weights, step_losses

PLAIN = LossConfig(facial_weight=0)
SLOTS = 5  # of region tokens in a text


def losses(
    parts: Parts, batch: TrainBatch, config: LossConfig, *, mask: bool = False
) -> dict[str, float]:
    values = step_losses(parts.trained, parts.frozen, batch, config, mask=mask).values
    return dict(zip(("loss", "noise", "facial"), values.tolist(), strict=True))


def test_features_equal_those_of_inference_though_zero_images_are_not_encoded(parts: Parts) -> None:
    positions = range(40)
    features = frozen_features(parts.frozen, parts.make(positions))
    pairs = parts.maker._pairs_at(positions)
    samples = parts.maker._samples(pairs, parts.maker.fetch(positions))
    conditions = collate([sample.conditions for sample in samples])
    uniform = torch.tensor(
        [draws.uniform(3, "drop", position) for position in positions], dtype=torch.float64
    )
    dropped = drop_conditions(
        conditions, uniform, parts.preparation.drop, parts.preparation.tokenizer
    )
    assert (dropped.identity.norm(dim=1) == 0).any() and (dropped.token_valid.sum(1) == 0).any()
    expected = encode_frozen(parts.frozen.base, dropped)
    for name in (
        "text_hidden",
        "clip_hidden",
        "region_hidden",
        "identity",
        "token_mask",
        "token_valid",
    ):
        torch.testing.assert_close(
            getattr(features, name), getattr(expected, name), rtol=1e-4, atol=1e-5
        )


def test_a_batch_with_all_conditions_dropped_has_gradients(parts: Parts) -> None:
    batch = parts.make(range(2))
    dropped = replace(
        batch,
        clip_images=batch.clip_images[:0],
        image_rows=batch.image_rows[:0],
        token_mask=torch.zeros_like(batch.token_mask),
        token_valid=torch.zeros_like(batch.token_valid),
        identity=torch.zeros_like(batch.identity),
    )
    outcome = step_losses(parts.trained, parts.frozen, dropped, LossConfig(), mask=False)
    outcome.total.backward()
    assert torch.isfinite(outcome.values).all()
    grads = [p.grad for p in parts.trained.adapter.parameters()]
    # A parameter without a gradient would block the other processes of a distributed run.
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)


def test_gradients_of_the_localisation_loss_reach_the_adapter(parts: Parts) -> None:
    batch = parts.make(range(4))
    outcome = step_losses(
        parts.trained, parts.frozen, batch, LossConfig(facial_weight=1.0), mask=False
    )
    noise = step_losses(parts.trained, parts.frozen, batch, PLAIN, mask=False)
    (outcome.total - noise.total).backward()  # the facial loss alone
    with_gradient = {
        name
        for name, p in parts.trained.adapter.named_parameters()
        if p.grad is not None and p.grad.norm() > 1e-8
    }
    for part in (
        "FacialEncoder.fuse_module.mlp1.fc1.weight",
        "FacialEncoder.visual_projection.latents",
        "image_proj_model.proj.0.weight",
    ):
        assert part in with_gradient
    hooked = [i for i, module in enumerate(parts.trained.adapter.adapter_modules) if module.hook]  # type: ignore[union-attr]
    assert hooked
    for i in hooked:
        assert f"adapter_modules.{i}.to_q_lora.up.weight" in with_gradient
        assert f"adapter_modules.{i}.to_k_lora.up.weight" in with_gradient


def test_the_localisation_loss_computes_for_its_tokens_in_its_layers_only(parts: Parts) -> None:
    batch = parts.make(range(2))

    def operations(weight: float) -> int:
        config = LossConfig(facial_weight=weight)
        with FlopCounterMode(display=False) as counter:
            step_losses(parts.trained, parts.frozen, batch, config, mask=False).total.backward()
        return int(counter.get_total_flops())

    plain = operations(0.0)
    added = operations(0.01) - plain
    states = parts.trained.adapter.prepare(frozen_features(parts.frozen, batch))
    noisy, _ = noised_latents(parts.frozen, batch)
    _, scores = predict_noise(
        parts.trained.unet, noisy, batch.timesteps, states, token_idx=batch.token_idx
    )
    widths = [
        parts.trained.unet.get_submodule(processor.hook).to_q.out_features
        for processor in parts.trained.adapter.adapter_modules
        if processor.hook
    ]
    products = [
        # the query with all texts' keys, then with the region tokens'
        2 * len(layer) * layer.shape[2] * width * (TOKEN_LIMIT + SLOTS)
        for layer, width in zip(scores, widths, strict=True)
    ]
    assert added == 3 * sum(products) > 0  # forward, and two products backward


def test_the_localisation_loss_falls_when_it_is_trained(parts: Parts) -> None:
    batch = parts.make(range(4))
    optimizer = torch.optim.AdamW(parts.trained.adapter.parameters(), lr=3e-3)
    before = losses(parts, batch, LossConfig())["facial"]
    for _ in range(12):
        optimizer.zero_grad()
        outcome = step_losses(
            parts.trained, parts.frozen, batch, LossConfig(facial_weight=1.0), mask=False
        )
        outcome.total.backward()
        optimizer.step()
    assert losses(parts, batch, LossConfig())["facial"] < before - 0.05


def test_masking_leaves_out_the_background(parts: Parts) -> None:
    batch = parts.make(range(2))
    no_person = replace(batch, foreground=torch.zeros_like(batch.foreground))
    everything = replace(batch, foreground=torch.ones_like(batch.foreground))
    assert losses(parts, no_person, PLAIN, mask=True)["noise"] == 0
    assert losses(parts, everything, PLAIN, mask=True) == losses(parts, batch, PLAIN)
    assert (
        0 < losses(parts, batch, PLAIN, mask=True)["noise"] < losses(parts, batch, PLAIN)["noise"]
    )


def test_latents_are_sampled_with_the_batchs_latent_noise(parts: Parts) -> None:
    batch = replace(parts.make(range(2)), timesteps=torch.tensor([0, 999]))
    noisy, target = noised_latents(parts.frozen, batch)
    vae, schedule = parts.frozen.base.vae, parts.frozen.noise_schedule
    with torch.no_grad():
        posterior = vae.encode(batch.pixels).latent_dist
    latents = (posterior.mean + posterior.std * batch.latent_noise) * vae.config.scaling_factor
    alphas = schedule.alphas_cumprod[[0, 999]].view(2, 1, 1, 1)
    torch.testing.assert_close(noisy, alphas.sqrt() * latents + (1 - alphas).sqrt() * batch.noise)
    torch.testing.assert_close(target, batch.noise)
    schedule.register_to_config(prediction_type="v_prediction")
    velocity = noised_latents(parts.frozen, batch)[1]
    expected = alphas.sqrt() * batch.noise - (1 - alphas).sqrt() * latents
    torch.testing.assert_close(velocity, expected)


def test_min_snr_weights(parts: Parts) -> None:
    schedule, steps = parts.frozen.noise_schedule, torch.tensor([0, 500, 999])
    alphas = schedule.alphas_cumprod[steps]
    snr = alphas / (1 - alphas)
    expected = torch.minimum(snr, torch.tensor(5.0)) / snr
    torch.testing.assert_close(snr_weights(schedule, steps, 5.0), expected)
    assert expected[0] < 0.01 and expected[2] == 1  # a small weight at little noise, 1 at much


def test_a_base_that_predicts_images_is_refused(parts: Parts) -> None:
    parts.frozen.base.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ConfigError, match="predicts 'sample'"):
        freeze(parts.frozen.base, 56)


def test_gradient_checkpointing_changes_no_gradient(parts: Parts) -> None:
    batch = parts.make(range(2))
    gradients: list[dict[str, torch.Tensor]] = []
    for checkpointing in (False, True):
        if checkpointing:
            parts.frozen.base.unet.enable_gradient_checkpointing()
        parts.trained.zero_grad()
        step_losses(
            parts.trained, parts.frozen, batch, LossConfig(facial_weight=1.0), mask=False
        ).total.backward()
        gradients.append(
            {
                n: p.grad.clone()
                for n, p in parts.trained.adapter.named_parameters()
                if p.grad is not None
            }
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


class _SyncRecorder(TorchDispatchMode):
    """Records operations that would make the host wait for the device.

    They read a value, or give a tensor whose shape depends on values.
    """

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in self.WAITING:
            self.operations.append(name)
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device(parts: Parts) -> None:
    batch = parts.make(range(2))
    with _SyncRecorder() as recorder:
        step_losses(
            parts.trained, parts.frozen, batch, LossConfig(snr_gamma=5.0), mask=True
        ).total.backward()
    assert recorder.operations == []
    with _SyncRecorder() as recorder:
        batch.identity.sum().item()
    assert recorder.operations == ["_local_scalar_dense"]  # so the recorder works
