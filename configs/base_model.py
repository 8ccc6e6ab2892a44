"""Settings of `make base`, which trains a small base model. Presets are in configs/base."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from configs.common import WeightsConfig
from configs.common import check as _check


@dataclass(frozen=True, slots=True, kw_only=True)
class PartConfig:
    """How a part of the base is trained."""

    steps: int = 1000
    batch_size: int = 32  # samples of a step, over all processes
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    # share of the steps over which the learning rate falls to 0 at the end
    decay: float = 0.0
    bf16: bool = False  # autocast to bfloat16, where the processor or GPU is faster with it

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            _check(getattr(self, name) > 0, f"{name}={getattr(self, name)}: expected at least 1")
        _check(self.learning_rate > 0, f"learning_rate={self.learning_rate}: expected more than 0")
        _check(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps}: expected at least 0")
        _check(0 <= self.decay <= 1, f"decay={self.decay}: expected 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderConfig(PartConfig):
    """An AutoencoderKL: pixels to latents of four channels."""

    # of each level; each level but the first halves the side
    channels: tuple[int, ...] = (32, 64, 96)
    layers: int = 1
    # side of the random crops that it learns from, in pixels; 0: whole images. It is convolutional,
    # so crops teach the same at less cost.
    crop: int = 0
    perceptual_weight: float = 0.3
    adversarial_weight: float = 0.02
    adversarial_from: float = 0.6  # share of the steps after which the discriminator has a say
    kl_weight: float = 1e-3  # of the divergence per number of a latent

    def __post_init__(self) -> None:
        PartConfig.__post_init__(self)
        _check(len(self.channels) > 1, f"channels={self.channels}: expected at least two levels")
        for name in ("perceptual_weight", "adversarial_weight", "kl_weight", "crop"):
            _check(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: expected at least 0")
        _check(
            0 <= self.adversarial_from <= 1,
            f"adversarial_from={self.adversarial_from}: expected 0 to 1",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TowersConfig(PartConfig):
    """CLIP's text tower and image tower."""

    text_layers: int = 2
    image_layers: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserConfig(PartConfig):
    """A UNet2DConditionModel on the autoencoder's latents."""

    channels: tuple[int, ...] = (64, 96, 128)
    attention: int = 1  # the finest level that attends to itself and to the text, 0: the first
    layers: int = 1
    heads: int = 4
    prediction_type: Literal["v_prediction", "epsilon"] = "v_prediction"
    # min-SNR weighting, 0: none. Of velocity it weighs pure noise, where sampling begins, with 0.
    snr_gamma: float = 0.0
    ema_decay: float = 0.999
    drop_text: float = 0.1  # share of samples without text, for classifier-free guidance
    short_text: float = 0.4  # share of samples with the first caption only
    # show half of the samples mirrored, with left and right exchanged in their texts
    mirror: bool = True
    start_from: str = ""  # folder of a UNet of the same shape, whose training is continued

    def __post_init__(self) -> None:
        PartConfig.__post_init__(self)
        _check(
            0 <= self.attention < len(self.channels),
            f"attention={self.attention}: expected the number of a level, counted from 0",
        )
        _check(0 <= self.ema_decay < 1, f"ema_decay={self.ema_decay}: expected 0 up to 1")
        total = self.drop_text + self.short_text
        _check(
            min(self.drop_text, self.short_text) >= 0 and total <= 1,
            f"drop_text and short_text add up to {total}: expected 0 to 1",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseConfig:
    """The settings of `python -m train.base_model run`."""

    data: str = ""  # a data set, the output of make dataset
    output: str = ""  # folder
    spec: Literal["small"] = "small"  # sizes that base and adapter share
    resolution: int = 64  # pixels
    seed: int = 0
    # factor on denoiser.steps; a higher one continues a finished training
    rounds: int = 1
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    towers: TowersConfig = field(default_factory=TowersConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    device: str = "auto"
    threads: int = 0  # of torch on the CPU; 0: $OMP_NUM_THREADS, else all cores
    checkpointing_steps: int = 200
    preview_steps: int = 500  # steps between two rows of pictures on the page
    log_every: int = 20
    weights: WeightsConfig = field(default_factory=WeightsConfig)

    def __post_init__(self) -> None:
        names = ("resolution", "rounds", "checkpointing_steps", "preview_steps", "log_every")
        for name in names:
            _check(getattr(self, name) > 0, f"{name}={getattr(self, name)}: expected at least 1")
        _check(self.threads >= 0, f"threads={self.threads}: expected at least 0")
