"""How fast a training step is, beside the bare model and the reference's order of work.

    python -m bench.train data=OUT --random-base FOLDER

`--random-base FOLDER` makes Stable Diffusion 1.5 (`model.spec=sdxl`: SDXL) and CLIP ViT-H/14 at
full size with random weights there, which train at the same speed as real ones, so nothing needs to
be downloaded. Without `data=OUT`, synthetic people are written beside it. Of the data, features are
computed and left there (`make features`).

Measured are four kinds of steps:

    bare       UNet with the adapter's attention, forward and backward; nothing else
    cached     the trainer's step, which reads features of VAE and image encoder
    uncached   the trainer's step, which runs these encoders: one call each for a micro-batch
    reference  the order of work of the reference's script, written here from a description of it:
               a call of the image encoder for each picture of each sample and of the text encoder
               for each text, losses that the host waits for in every step, and no cache

First they take turns, one step of each kind, always with the batches of the first step, which are
in memory: no loader runs. `step_ms` is the median of a kind's steps, and `speed_of_bare` the median
of `bare`'s time divided by its own in the same turn.

Then `cached` and `uncached` train by themselves, one after the other, each with a loader that it
starts and ends, so that no other loader runs. As in the trainer, the host is at most one step ahead
of the GPU. The first steps aren't measured: two, and one for each micro-batch that the loader can
have ready. Of the `--steps` that follow, without a pause, `training_step_ms` is the time of a step,
`samples_per_s` the speed, and `wait_ms` the time in a step that the host waits for samples, while
the GPU may still compute. Of the other kinds, which have no loader, `samples_per_s` follows from
`step_ms`. `gpu_gb` is the most memory of the GPU.

Last come the parts of the cached step, each by itself, with the localisation loss's share, and
model FLOPs utilisation: the share of the device's peak that the UNet's operations reach at
`samples_per_s`. All is printed as JSON.
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
from model.consistentid import encode_images, predict_noise
from train.data import TrainBatch, unpacked
from train.facts import StepFacts
from train.features.make import make_features
from train.flops import peak_flops, sample_flops
from train.packing import IMAGES, PackedBatch
from train.step import frozen_features, noised_latents, step_losses
from train.stopping import Stop
from train.texts import text_ids, text_states
from train.trainer import Trainer

_WARMUP: Final = 2  # steps of each kind that are not measured
_PREFETCHED: Final = 2  # micro-batches that a loader's process has ready, torch's default
KINDS: Final = ("bare", "cached", "uncached", "reference")
_TRAINING: Final = ("cached", "uncached")  # those that are also measured with a loader
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
            people = write_people(random_base.parent, _PEOPLE)
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
        keep_features=0,
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
        for name in (each for each in _TRAINING if each in runs):
            runs[name].train(steps)
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
    """A run that takes the steps of one kind. seconds: of each step in turns. training, waiting:
    seconds of a step with a loader, and of its wait for samples; 0.0 if that wasn't measured.
    """

    def __init__(self, name: str, config: TrainConfig, stack: ExitStack) -> None:
        self._name = name
        self._allocated, self._most = -_allocated(), 0  # bytes of a GPU, of this run alone
        self.trainer = Trainer(config, Watcher(prints=True), stack)
        self.seconds: list[float] = []
        self.training = self.waiting = 0.0
        with closing(self.trainer._batches()) as loaded:
            self._first = [next(loaded) for _ in range(self.trainer.batch.accumulation)]
        self._allocated += _allocated()

    def step(self) -> None:
        """Takes a step with the first batches."""
        with self._memory(), self._clock(self.seconds):
            if self._name == "bare":
                for batch in self._first:
                    self.bare(self._moved(batch))
            elif self._name == "reference":
                self._reference()
            else:
                self._take(iter(self._first), 1)

    def train(self, steps: int) -> None:
        """Takes steps without a pause, with a new loader, and measures them."""
        waits: list[float] = []
        seconds: list[float] = []
        with self._memory(), closing(self.trainer._batches()) as loaded:
            batches = _timed(loaded, waits)
            self._take(batches, _WARMUP + _PREFETCHED * self.trainer.config.num_workers)
            waits.clear()
            with self._clock(seconds):
                self._take(batches, steps)
        self.training, self.waiting = seconds[0] / steps, sum(waits) / steps

    def _take(self, batches: Iterator[PackedBatch], steps: int) -> None:
        """Takes steps of the trainer. As in its `run`, the host is at most one step ahead."""
        previous: StepFacts | None = None
        for _ in range(steps):
            step_facts = self.trainer._step(batches, Stop())
            self.trainer.progress.step += 1
            if previous is not None:
                previous.numbers.tolist()
            previous = step_facts

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
        for packed in self._first:
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
            ids = text_ids(batch.input_ids, batch.input_ids_2)
            encoded = replace(
                batch,
                hidden=rows[batch.image_rows],
                texts=torch.cat([text_states(frozen.base, each[None]) for each in ids]),
                encoded_texts=batch.encoded_texts[:0],
                text_rows=torch.arange(1, 1 + len(ids), device=trainer.device),
                text_names=(),
            )
            losses = step_losses(trainer.model, frozen, encoded, trainer.config.loss, mask=False)
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
        own = self.seconds[_WARMUP:]
        values = {
            "step_ms": round(1e3 * statistics.median(own), 1),
            "samples_per_s": round(self.samples_per_second(), 3),
            "speed_of_bare": round(
                statistics.median(b / o for b, o in zip(bare, own, strict=True)), 3
            ),
        }
        if self.training:
            values["training_step_ms"] = round(1e3 * self.training, 1)
            values["wait_ms"] = round(1e3 * self.waiting, 2)
        if self._most:
            values["gpu_gb"] = round(self._most / 1e9, 2)
        return values

    def samples_per_second(self) -> float:
        seconds = self.training or statistics.median(self.seconds[_WARMUP:])
        return self.trainer.batch.size / seconds

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
    they reach at each kind's samples per second.
    """
    run = runs["bare"]
    trainer = run.trainer
    flops = sample_flops(trainer.config, trainer.spec, trainer.frozen.base)
    values: dict[str, Any] = {"tera_operations_a_step": round(flops * trainer.batch.size / 1e12, 3)}
    listed = peak_flops(run.device_name(), trainer.config.mixed_precision)
    if peak := 1e12 * peak_tflops or listed:
        values["peak_tflops"] = round(peak / 1e12)
        values["model_flops_utilisation"] = {
            kind: round(flops * each.samples_per_second() / peak, 3) for kind, each in runs.items()
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
