"""Speed of training the small base's autoencoder and UNet, in several shapes, side by side:

    python -m bench.small_base                  # two CPU threads; a GPU if there is one

Each round times some steps of every variant, on random pictures; the table has the median of the
rounds, and the ratio to the first row. Parts and steps are those of `make base`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator

from configs.base_model import AutoencoderConfig, BaseConfig, DenoiserConfig
from configs.load import load
from model.prompt import add_marks
from model.spec import spec_named
from model.tokens import empty_ids
from model.vocabulary import clip_tokenizer
from stages.backends.runtime import pin_threads
from stages.backends.weights import Weights
from train.base_model.autoencoder import Autoencoder
from train.base_model.denoiser import Denoiser
from train.base_model.part import Part
from train.base_model.samples import Samples
from train.base_model.towers import make_towers

_SAMPLES = 256


def autoencoders(preset: AutoencoderConfig) -> Iterator[tuple[str, AutoencoderConfig]]:
    """Yields name and settings of each variant, the preset's first."""
    for name, other in (
        ("preset", preset),
        ("float32", replace(preset, bf16=False)),
        ("channels 16, 48, 96", replace(preset, channels=(16, 48, 96))),
        ("crops of 32", replace(preset, crop=32)),
    ):
        yield name, replace(other, adversarial_from=0.0)


def denoisers(preset: DenoiserConfig) -> Iterator[tuple[str, DenoiserConfig]]:
    """Yields name and settings of each variant, the preset's first."""
    yield "preset", preset
    yield "bfloat16", replace(preset, bf16=True)
    yield "attention at all levels", replace(preset, attention=0)
    yield "channels 64, 128, 128", replace(preset, channels=(64, 128, 128))


def random_samples(resolution: int, side: int) -> Samples:
    """Returns samples of random numbers. side: of the image encoder's images, in pixels."""

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randint(256, (_SAMPLES, *shape), dtype=torch.uint8)

    return Samples(
        pixels=pixels(3, resolution, resolution),
        photos=pixels(3, side, side),
        regions=pixels(5, 3, side, side),
        valid=torch.ones(_SAMPLES, 5, dtype=torch.bool),
        ids=torch.randint(400, (_SAMPLES, 3, 77)),
    )


def measure(parts: dict[str, Part], steps: int, rounds: int) -> dict[str, float]:
    """Returns samples/s of each part, the median of the rounds."""
    rates: dict[str, list[float]] = {name: [] for name in parts}
    step = 0
    for number in range(rounds + 1):  # the first one warms up
        for name, part in parts.items():
            size, started = part.settings.batch_size, time.perf_counter()
            for own in range(step + 1, step + steps + 1):
                positions = range(own * size, (own + 1) * size)
                losses = part.update(own, positions, [each % _SAMPLES for each in positions])
            losses.tolist()  # waits for the device
            if number:
                rates[name].append(steps * size / (time.perf_counter() - started))
        step += steps
    return {name: median(values) for name, values in rates.items()}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--preset", default="configs/base/cpu.yaml")
    arguments.add_argument("--batch", type=int, default=0, help="samples of a step")
    arguments.add_argument("--steps", type=int, default=4)
    arguments.add_argument("--rounds", type=int, default=3)
    chosen = arguments.parse_args()
    config = load(BaseConfig, chosen.preset, ())
    pin_threads(2)
    spec, accelerator = spec_named(config.spec), Accelerator()
    samples = random_samples(config.resolution, spec.vision_size)
    tokenizer: Any = add_marks(clip_tokenizer(Weights().fetch("clip_bpe")))
    text_encoder = make_towers(config.towers, spec).text_model
    vae: Any = None

    def autoencoder(settings: AutoencoderConfig) -> Part:
        return Autoencoder(settings, 0, accelerator, samples, Weights())

    def denoiser(settings: DenoiserConfig) -> Part:
        sides = tokenizer(["left", "right"]).input_ids
        empty = empty_ids(tokenizer)
        return Denoiser(settings, spec, 0, accelerator, samples, vae, text_encoder, empty, sides)

    def show(title: str, variants: Iterator[Any], make: Callable[[Any], Part]) -> dict[str, Part]:
        parts = {
            name: make(replace(own, batch_size=chosen.batch or own.batch_size))
            for name, own in variants
        }
        rates = measure(parts, chosen.steps, chosen.rounds)
        print(f"\n{title}, on {accelerator.device.type}: samples/s, ratio to the first row")
        for name, rate in rates.items():
            print(f"  {name:<26} {rate:8.1f}  {rate / rates['preset']:5.2f}")
        return parts

    parts: Any = show("autoencoder", autoencoders(config.autoencoder), autoencoder)
    vae = parts["preset"].stateful["vae"]
    show("UNet", denoisers(config.denoiser), denoiser)


if __name__ == "__main__":
    main()
