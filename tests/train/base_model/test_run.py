"""A base model that is trained in two steps for each part: what it writes, and how it continues."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configs.base_model import AutoencoderConfig, BaseConfig, DenoiserConfig, TowersConfig
from configs.errors import ConfigError, WeightsError
from tests.sharing import shared_folder
from train.base_model.denoiser import exchanged_sides
from train.base_model.run import train_base
from train.stopping import Stop

LOSSES = ("autoencoder", "towers", "denoiser")


class Quiet:
    """A watcher that remembers the steps. stop_at: the step of `part` at which a signal comes."""

    def __init__(self, stop: Stop | None = None, part: str = "", stop_at: int = 0) -> None:
        self.steps: list[tuple[str, int]] = []
        self._stop, self._part, self._stop_at, self._name = stop, part, stop_at, ""

    def message(self, text: str) -> None:
        pass

    def start(self, name: str, step: int, total: int, batch_size: int) -> None:
        self._name = name

    def step(self, step: int, losses: dict[str, float] | None) -> None:
        self.steps.append((self._name, step))
        if self._stop is not None and (self._name, step) == (self._part, self._stop_at):
            self._stop.signal = signal.SIGTERM


def settings(data: Path, output: Path) -> BaseConfig:
    part = {"steps": 4, "batch_size": 2, "warmup_steps": 1}
    return BaseConfig(
        data=str(data),
        output=str(output),
        resolution=32,
        autoencoder=AutoencoderConfig(channels=(16, 16), adversarial_from=0.25, **part),
        towers=TowersConfig(text_layers=1, image_layers=1, **part),
        denoiser=DenoiserConfig(channels=(16, 32), heads=2, **part),
        threads=1,
        checkpointing_steps=2,
        preview_steps=2,
        log_every=1,
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return shared_folder(
        tmp_path_factory, "small_base", lambda folder: _train(settings(data, folder))
    )


def _train(config: BaseConfig) -> None:
    assert train_base(config, Quiet()) == 0


def weights(output: Path) -> dict[str, bytes]:
    """Returns file → bytes of all weights in OUT/base."""
    base = output / "base"
    return {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*.safetensors")}


def test_the_pipeline_of_diffusers_loads_it_and_draws(trained: Path) -> None:
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(trained / "base")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe("a person", num_inference_steps=2, output_type="np", generator=generator).images
    assert images.shape == (1, 32, 32, 3)  # 16 × 16 latents: the autoencoder halves the side
    assert images.std() > 0


def test_its_weights_are_of_half_precision_and_finite(trained: Path) -> None:
    for path in (trained / "base").rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert tensor.dtype == torch.float16, (path, name)
            assert torch.isfinite(tensor).all(), (path, name)


def test_the_scaling_factor_gives_latents_unit_variance(trained: Path, data: Path) -> None:
    import diffusers

    from train.base_model.samples import Samples

    vae = diffusers.AutoencoderKL.from_pretrained(trained / "base/vae").float()
    import numpy as np

    pixels = torch.from_numpy(np.load(trained / "samples/pixels.npy"))
    with torch.no_grad():
        latents = vae.encode(pixels.float() / 127.5 - 1).latent_dist.mean
    assert float(latents.std()) * vae.config.scaling_factor == pytest.approx(1, abs=0.01)
    assert Samples.__dataclass_fields__.keys() >= {"pixels", "ids"}


def test_the_page_shows_curves_and_pictures_of_each_part(trained: Path) -> None:
    html = (trained / "index.html").read_text()
    for part in LOSSES:
        assert f"{part}/previews/000004.png" in html
        assert (trained / part / "previews/000004.png").is_file()
    assert html.count("<polyline") == 4 + 3 + 1


@pytest.mark.parametrize(
    ("part", "step"),
    [
        pytest.param("autoencoder", 2, marks=pytest.mark.thorough),
        pytest.param("towers", 1, marks=pytest.mark.thorough),
        ("denoiser", 1),
    ],
)
def test_a_stopped_run_continues_to_the_same_bytes(
    trained: Path, data: Path, tmp_path: Path, part: str, step: int
) -> None:
    config = settings(data, tmp_path / "out")
    stop = Stop()

    @contextmanager
    def stopping() -> Iterator[Stop]:
        yield stop

    assert train_base(config, Quiet(stop, part, step), stopping) == signal.SIGTERM
    watcher = Quiet()
    assert train_base(config, watcher) == 0
    assert watcher.steps[0] == (part, step + 2)  # the signal was seen during the next step
    assert weights(tmp_path / "out") == weights(trained)
    for name in LOSSES:
        ours, theirs = (each / name / "losses.jsonl" for each in (tmp_path / "out", trained))
        assert ours.read_text() == theirs.read_text()


def test_a_complete_run_does_nothing(trained: Path, data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*.safetensors")}
    watcher = Quiet()
    assert train_base(settings(data, trained), watcher) == 0
    assert not watcher.steps
    assert before == {path: path.stat().st_mtime_ns for path in trained.rglob("*.safetensors")}


def test_more_rounds_train_the_denoiser_only(trained: Path, data: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(trained, tmp_path / "out"))
    watcher = Quiet()
    assert train_base(replace(settings(data, copy), rounds=2), watcher) == 0
    assert watcher.steps == [("denoiser", step) for step in (5, 6, 7, 8)]
    assert json.loads((copy / "denoiser/final/metrics.json").read_text())["steps"] == 8
    fewer = Quiet()
    assert train_base(settings(data, copy), fewer) == 0  # one round is part of the two
    assert not fewer.steps
    assert json.loads((copy / "denoiser/final/metrics.json").read_text())["steps"] == 8
    changed = {name for name, data in weights(copy).items() if data != weights(trained)[name]}
    assert changed == {"unet/diffusion_pytorch_model.safetensors"}


def test_other_settings_in_the_same_output_are_refused(trained: Path, data: Path) -> None:
    config = settings(data, trained)
    other = replace(config, autoencoder=replace(config.autoencoder, channels=(16, 32)))
    with pytest.raises(ConfigError, match=r"channels was \[16, 16\] and is \[16, 32\]"):
        train_base(other, Quiet())


def test_a_denoiser_starts_from_another_and_one_of_another_shape_is_refused(
    trained: Path, data: Path, tmp_path: Path
) -> None:
    import shutil

    copy = Path(shutil.copytree(trained, tmp_path / "out"))
    shutil.rmtree(copy / "denoiser")
    config = settings(data, copy)
    unet = trained / "base/unet"
    slow = replace(config.denoiser, start_from=str(unet), steps=1, learning_rate=1e-9)
    assert train_base(replace(config, denoiser=slow), Quiet()) == 0
    name = "diffusion_pytorch_model.safetensors"
    before, after = load_file(unet / name), load_file(copy / "base/unet" / name)
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)
    shutil.rmtree(copy / "denoiser")
    wider = replace(slow, channels=(16, 48))
    with pytest.raises(WeightsError, match=r"start_from=.* has a UNet of another shape"):
        train_base(replace(config, denoiser=wider), Quiet())


def test_texts_of_mirrored_pictures_name_the_other_side() -> None:
    left, right, begin, end = 1, 2, 8, 9
    ids = torch.tensor([[begin, left, 5, right, end], [begin, 4, 4, left, end]])
    exchanged = exchanged_sides(ids, [[begin, left, end], [begin, right, end]])
    assert exchanged.tolist() == [[begin, right, 5, left, end], [begin, 4, 4, right, end]]
