"""How fast a training step is, beside the bare model and the reference's order of work.

    python -m bench.train data=OUT --random-base FOLDER

`--random-base FOLDER` makes Stable Diffusion 1.5 (`model.spec=sdxl`: SDXL) and CLIP ViT-H/14 at
full size with random weights there, which train at the same speed as real ones, so nothing needs to
be downloaded. Without `data=OUT`, synthetic people are written beside it. Of the data, features are
computed and left there (`make features`).

Measured in turns, on the same batches:

    bare       UNet with the adapter's attention, forward and backward; nothing else
    cached     the trainer's step, which reads features of VAE and image encoder
    uncached   the trainer's step, which runs these encoders: one call each for a micro-batch
    reference  the order of work of the reference's script, written here from a description of it:
               a call of the image encoder for each picture of each sample, losses that the host
               waits for in every step, and no cache

Printed as JSON: the median of a step, samples/s, the speed beside `bare` in the same turns, the
wait for samples, and the most memory of the GPU. Then the parts of the cached step, each by itself,
with the localisation loss's share, and model FLOPs utilisation: the share of the device's peak that
the UNet's operations in a step reach.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer

from bench.bases import make_base
from bench.synthetic_person import write_people
from bench.watcher import Watcher
from configs.load import load
from configs.training import DataSource, TrainConfig
from model.consistentid import encode_images, encode_text, predict_noise
from train.data import TrainBatch, unpacked
from train.features.make import make_features
from train.flops import peak_flops, sample_flops
from train.packing import IMAGES, PackedBatch
from train.step import frozen_features, noised_latents, step_losses
from train.stopping import Stop
from train.trainer import Trainer

_WARMUP: Final = 2  # steps of each kind that are not measured
KINDS: Final = ("bare", "cached", "uncached", "reference")
_PEOPLE: Final = 64  # synthetic ones, where no data is given


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE of the preset.")] = None,
    config: Annotated[Path, typer.Option(help="A preset.")] = Path("configs/train/sd15.yaml"),
    random_base: Annotated[
        Path | None, typer.Option(help="Folder for a base of random weights; made once.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps of each kind.")] = 20,
    kinds: Annotated[
        list[str] | None, typer.Option("--kind", help="Of those above, beside bare; may repeat.")
    ] = None,
    peak_tflops: Annotated[
        float, typer.Option(help="Of the device, in the training's precision; 0: of its data sheet")
    ] = 0.0,
) -> None:
    """Measure training steps."""
    settings = load(TrainConfig, config, overrides or [])
    if random_base is not None:
        if not random_base.exists():
            make_base(
                random_base, settings.model.spec, "cuda" if torch.cuda.is_available() else "cpu"
            )
        settings = replace(settings, model=replace(settings.model, base=str(random_base)))
        if not settings.data:
            people = write_people(random_base.with_name("people"), _PEOPLE)
            settings = replace(settings, data=(DataSource(path=str(people)),), split="all")
    print(json.dumps(compare(settings, steps, kinds or KINDS[1:], peak_tflops), indent=1))


def compare(
    config: TrainConfig, steps: int, kinds: Sequence[str] = KINDS[1:], peak_tflops: float = 0.0
) -> dict[str, Any]:
    """Computes what features of the data lack, measures, and returns what is printed."""
    config = replace(
        config,
        features=replace(config.features, kinds=("vae", "image")),
        max_train_steps=10_000_000,
        report_to="none",
    )
    make_features(config, Watcher(prints=True))
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory(prefix="train-") as folder, ExitStack() as stack:
        for name in (KINDS[0], *kinds):
            features = replace(config.features, use=name in ("bare", "cached"))
            own = replace(config, output=str(Path(folder) / name), features=features)
            runs[name] = Run(name, own, stack)
        for _ in range(_WARMUP + steps):
            for run in runs.values():
                run.step()
        bare = runs["bare"].seconds[_WARMUP:]
        return {
            "device": runs["bare"].device_name(),
            "precision": config.mixed_precision,
            "samples_a_step": config.global_batch_size,
            **{name: run.measured(bare) for name, run in runs.items()},
            **({"parts_of_cached_ms": runs["cached"].parts()} if "cached" in runs else {}),
            **_utilisation(runs, peak_tflops),
        }


class Run:
    """A run that takes the steps of one kind."""

    def __init__(self, name: str, config: TrainConfig, stack: ExitStack) -> None:
        self._name = name
        self._allocated, self._most = -_allocated(), 0  # bytes of a GPU, of this run alone
        self.trainer = Trainer(config, Watcher(prints=True), stack)
        self._waits: list[float] = []
        loaded = stack.enter_context(closing(self.trainer._batches()))
        self._batches = _timed(loaded, self._waits)
        self.seconds: list[float] = []
        self._first = [next(loaded) for _ in range(self.trainer.batch.accumulation)]
        self._allocated += _allocated()

    def step(self) -> None:
        with self._memory(), self._clock(self.seconds):
            if self._name == "bare":
                for batch in self._first:
                    self.bare(self._moved(batch))
            elif self._name == "reference":
                self._reference()
            else:
                self.trainer._step(self._batches, Stop())
                self.trainer.progress.step += 1

    def bare(self, batch: TrainBatch) -> None:
        """The UNet forward and backward, with states and noise that were made before."""
        trainer = self.trainer
        with torch.no_grad():
            states, noisy, target, sizes, pooled = self._inputs(batch)
        predicted, _ = predict_noise(
            trainer.trained.unet,
            noisy,
            batch.timesteps,
            states,
            **({} if pooled is None else {"pooled": pooled, "time_ids": sizes}),
        )
        trainer.accelerator.backward((predicted.float() - target).square().mean())
        trainer.optimization.optimizer.zero_grad()

    def _inputs(self, batch: TrainBatch) -> tuple[Any, ...]:
        if not hasattr(self, "_prepared"):
            frozen = self.trainer.frozen
            features = frozen_features(frozen, batch)
            states = self.trainer.trained.adapter.prepare(features).detach()
            self._prepared = (
                states,
                *noised_latents(frozen, batch),
                batch.sizes.float(),
                features.pooled,
            )
        return self._prepared

    def _reference(self) -> None:
        trainer = self.trainer
        for packed in (next(self._batches) for _ in range(trainer.batch.accumulation)):
            batch = self._moved(packed)
            frozen = trainer.frozen
            rows = frozen.zero_hidden.expand(len(batch.valid) * IMAGES, -1, -1).clone()
            places = {int(row): index for index, row in enumerate(batch.image_rows.tolist())}
            for row in range(len(rows)):  # each picture by itself, absent ones too
                pixels = (
                    batch.clip_images[places[row]][None]
                    if row in places
                    else torch.zeros_like(batch.clip_images[:1])
                )
                rows[row] = encode_images(frozen.base.image_encoder, pixels)[0]
            for ids, ids_2 in zip(batch.input_ids, batch.input_ids_2, strict=True):
                encode_text(frozen.base, ids[None], ids_2[None])
            hidden = rows.reshape(len(batch.valid), IMAGES, *rows.shape[1:])
            shown = replace(batch, hidden=hidden.flatten(0, 1)[batch.image_rows])
            losses = step_losses(trainer.model, frozen, shown, trainer.config.loss, mask=False)
            trainer.accelerator.backward(losses.total)
            losses.total.item()  # the script prints the loss of each step
        trainer.optimization.step(trainer.accelerator)

    def _moved(self, batch: PackedBatch) -> TrainBatch:
        return unpacked(batch, self.trainer.preparation, self.trainer.device)

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """Adds what the context allocates to what this run holds, and keeps the most."""
        before = _allocated()
        if before:
            torch.cuda.reset_peak_memory_stats()
        yield
        if before:
            peak = torch.cuda.max_memory_allocated() - before
            self._most = max(self._most, self._allocated + peak)
            self._allocated += _allocated() - before

    @contextmanager
    def _clock(self, seconds: list[float]) -> Iterator[None]:
        self._synchronize()
        began = time.perf_counter()
        yield
        self._synchronize()
        seconds.append(time.perf_counter() - began)

    def _synchronize(self) -> None:
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize()

    def measured(self, bare: list[float]) -> dict[str, Any]:
        """bare: seconds of the bare model's steps, in the same turns."""
        own, size = self.seconds[_WARMUP:], self.trainer.batch.size
        usual = statistics.median(own)
        waits = self._waits[-len(own) * self.trainer.batch.accumulation :]
        return {
            "step_ms": round(1e3 * usual, 1),
            "samples_per_s": round(size / usual, 3),
            "speed_of_bare": round(
                statistics.median(b / o for b, o in zip(bare, own, strict=True)), 3
            ),
            "wait_ms": round(1e3 * sum(waits) / len(own), 2),
            **({"gpu_gb": round(self._most / 1e9, 2)} if self._most else {}),
        }

    def parts(self, turns: int = 3) -> dict[str, float]:
        """Returns the milliseconds of each part of a step, by itself, for one micro-batch."""
        trainer, config = self.trainer, self.trainer.config
        batch = self._moved(self._first[0])
        without = replace(config.loss, facial_weight=0.0)

        def forward(loss: Any) -> Any:
            return step_losses(trainer.model, trainer.frozen, batch, loss, mask=False).total

        def backward(loss: Any) -> None:
            trainer.accelerator.backward(forward(loss))
            trainer.optimization.optimizer.zero_grad()

        encode = self._time(lambda: frozen_features(trainer.frozen, batch), turns)
        noise = self._time(lambda: noised_latents(trainer.frozen, batch), turns)
        ahead = self._time(lambda: forward(config.loss), turns)
        whole = self._time(lambda: backward(config.loss), turns)
        plain = self._time(lambda: backward(without), turns)
        move = self._time(lambda: self._moved(self._first[0]), turns)
        updates: list[float] = []
        for _ in range(turns):
            trainer.accelerator.backward(forward(config.loss))
            with self._clock(updates):
                trainer.optimization.step(trainer.accelerator)
        parts = {
            "move": move,
            "encode": encode,
            "noise": noise,
            "forward": ahead - encode - noise,
            "backward": whole - ahead,
            "of that, localisation loss": whole - plain,
            "optimizer, of a step": statistics.median(updates),
        }
        return {name: round(1e3 * seconds, 2) for name, seconds in parts.items()}

    def _time(self, function: Callable[[], object], turns: int) -> float:
        seconds: list[float] = []
        for _ in range(turns):
            with self._clock(seconds):
                function()
        return statistics.median(seconds)

    def device_name(self) -> str:
        device = self.trainer.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _utilisation(runs: dict[str, Run], peak_tflops: float) -> dict[str, Any]:
    """Returns the operations of the bare model in a step, and the share of the device's peak that
    they reach in each kind of step.
    """
    run = runs["bare"]
    trainer = run.trainer
    flops = trainer.batch.size * sample_flops(trainer.config, trainer.spec, trainer.frozen.base)
    values: dict[str, Any] = {"tera_operations_a_step": round(flops / 1e12, 3)}
    listed = peak_flops(run.device_name(), trainer.config.mixed_precision)
    if peak := 1e12 * peak_tflops or listed:
        values["peak_tflops"] = round(peak / 1e12)
        values["model_flops_utilisation"] = {
            kind: round(flops / statistics.median(each.seconds[_WARMUP:]) / peak, 3)
            for kind, each in runs.items()
        }
    return values


def _timed(batches: Iterator[PackedBatch], waits: list[float]) -> Iterator[PackedBatch]:
    """Yields the batches; adds to `waits` how long each was waited for, in seconds."""
    while True:
        began = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - began)
        yield batch


if __name__ == "__main__":
    typer.run(main)
