"""A base of the spec `small`, as it is trained here: latents at half the pixels' resolution, and
noise up to a signal-to-noise ratio of 0. Runs of adapters that lack parts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch

from configs.errors import ConfigError, WeightsError
from configs.training import LossConfig, ModelConfig, TrainConfig
from model.checkpoint import read_adapter
from model.spec import SPECS
from tests.train.helpers import Parts, run, small
from train.mixture import Mixture
from train.replay import replay
from train.step import noised_latents, snr_weights, step_losses

SIDE = 36  # pixels: a multiple of 4, by which VAE and UNet scale together, and not of 8


@pytest.fixture(scope="module")
def config(data: Path, small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    out = tmp_path_factory.mktemp("small")
    model = ModelConfig(spec="small", base=str(small_base), device="cpu")
    return small(data, small_base, out, model=model, resolution=SIDE, max_train_steps=2)


def test_noise_and_target_are_those_of_the_bases_own_scheduler(
    config: TrainConfig, mixture: Mixture, small_base: Path
) -> None:
    parts = Parts(config, mixture)
    own = diffusers.DDIMScheduler.from_pretrained(small_base / "scheduler")
    assert own.alphas_cumprod[-1] == 0 and own.config.prediction_type == "v_prediction"
    assert torch.equal(parts.frozen.noise_schedule.alphas_cumprod, own.alphas_cumprod)
    batch = replace(parts.make(range(2)), timesteps=torch.tensor([999, 400]))
    noisy, target = noised_latents(parts.frozen, batch)
    assert noisy.shape == target.shape == (2, 4, SIDE // 2, SIDE // 2)
    vae = parts.frozen.base.vae
    with torch.no_grad():
        posterior = vae.encode(batch.pixels).latent_dist
    latents = (posterior.mean + posterior.std * batch.latent_noise) * vae.config.scaling_factor
    assert torch.equal(noisy[0], batch.noise[0]) and torch.equal(target[0], -latents[0])
    expected = own.get_velocity(latents, batch.noise, batch.timesteps)
    torch.testing.assert_close(target, expected)
    torch.testing.assert_close(noisy, own.add_noise(latents, batch.noise, batch.timesteps))
    losses = [
        step_losses(parts.trained, parts.frozen, batch, LossConfig(snr_gamma=gamma), mask=False)
        for gamma in (0.0, 5.0)
    ]
    weights = own.alphas_cumprod[batch.timesteps]  # of SNRs under 5
    torch.testing.assert_close(losses[1].errors[:, 1], losses[0].errors[:, 1] * weights)


@pytest.mark.parametrize(("kind", "last"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_weights_are_finite_without_signal(kind: str, last: float) -> None:
    schedule = diffusers.DDPMScheduler(rescale_betas_zero_snr=True, prediction_type=kind)
    by_timestep = snr_weights(schedule, torch.arange(1000), 5.0)
    assert torch.isfinite(by_timestep).all() and by_timestep[-1] == last
    assert float(by_timestep[-2]) == pytest.approx(last, abs=1e-3)


def test_an_adapter_without_lora_trains_resumes_and_is_replayed(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, output=str(tmp_path / "one"))
    lacking = replace(config, model=replace(config.model, without=("lora",)))
    run(replace(lacking, max_train_steps=1))
    adapter = run(lacking).adapter
    assert adapter is not None
    assert read_adapter(adapter).spec == replace(SPECS["small"], without=("lora",))
    assert replay(tmp_path / "one", 2).equal
    with pytest.raises(ConfigError, match=r"model\.without=.*lora.*, now '\[\]'"):
        run(replace(config, max_train_steps=6))
    other = replace(config, output=str(tmp_path / "two"), adapter=str(adapter))
    with pytest.raises(WeightsError, match=r"the model lacks no part; set model\.without="):
        run(other)


def test_a_resolution_that_the_base_cannot_take_is_refused(
    config: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="resolution=34: this base needs a multiple of 4"):
        run(replace(config, output=str(tmp_path), resolution=34))
