"""What a run records of its steps: losses.jsonl, spikes.jsonl and, if asked for, keys.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from configs.training import TrainConfig
from train.history import HISTORY, KEYS, TIMES, History, KeyLog, Lines
from train.losses import LossWindow, losses_of_process
from train.mixture import Mixture
from train.order import Order
from train.outcome import Progress
from train.packing import PackedBatch
from train.resume import flatten
from train.spikes import SpikeCheck, SpikeContext
from train.step import LOSSES, StepLosses, masks_background
from train.step_clock import StepClock


def start_trackers(config: TrainConfig, accelerator: Any) -> None:
    """Starts TensorBoard or Weights & Biases, if that was asked for and not done."""
    if config.report_to != "none" and not accelerator.trackers:
        accelerator.init_trackers("train", config=flatten(asdict(config)))


def spike_context(
    config: TrainConfig,
    output: Path,
    batch: int,
    mixture: Mixture,
    order: Order,
    message: Callable[[str], None],
) -> SpikeContext:
    """Returns what the check for spikes knows of a run. batch: samples of a step."""
    return SpikeContext(
        output=output,
        name=config.output,
        batch=batch,
        names_at=lambda position: mixture.name(order.sample(position)),
        masked=lambda step: masks_background(config.loss, config.seed, step),
        message=message,
    )


class StepRecords:
    """The records of steps, on each process. Losses stay on the device until `fetch`.

    progress: that the run resumes from. context: for spikes, with the run's folder and the size of
    a step. accumulation: micro-batches of a process in a step. accelerator: gathers the records of
    all processes. is_main: whether this process writes. keys: whether to write those of all
    samples. spikes: what `state` returned there; None for a new run.

    history: the losses of every step; None on processes other than the main one.
    """

    def __init__(
        self,
        progress: Progress,
        context: SpikeContext,
        accumulation: int,
        accelerator: Any,
        *,
        is_main: bool,
        keys: bool,
        spikes: dict[str, Any] | None,
    ) -> None:
        from accelerate.utils import gather_object

        output: Path = context.output
        step = progress.step
        self._batch = context.batch
        self._window = LossWindow(accumulation, accelerator.gather)
        self.history = History(output / HISTORY, step=step) if is_main else None
        self._spikes = SpikeCheck(context, step, spikes) if is_main else None
        lines = Lines(output / KEYS, step=step) if is_main else None
        gather: Callable[[list[Any]], list[Any]] = gather_object
        self._keys = KeyLog(lines, gather) if keys else None
        self._times = Lines(output / TIMES, step=step) if is_main else None
        self._waited, self._timed = 0.0, replace(progress)
        self.clock = StepClock(accelerator.device)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint holds of the records, as tensors and plain values."""
        return self._spikes.state() if self._spikes is not None else {}

    def add(
        self,
        step: int,
        micro: Sequence[PackedBatch],
        losses: Sequence[StepLosses],
        rates: Mapping[str, float],
        waited: float,
    ) -> None:
        """Adds this process's part of a step. micro, losses: of its micro-batches. rates: the
        learning rates. waited: seconds for the samples.
        """
        self._window.add(losses_of_process(losses), rates)
        self._waited += waited
        if self._keys is not None:
            self._keys.add(step, micro)

    def add_times(self, progress: Progress, memory: int) -> None:
        """Writes how long the steps since the last call took, each, for how much of that this
        process waited for samples, and how long the device took for each part. memory: the most
        that was used, in bytes.
        """
        steps, parts = progress.step - self._timed.step, self.clock.fetch()
        if self._times is not None and steps:
            line = {
                "step": progress.step,
                "steps": steps,
                "samples": self._batch,
                "seconds": round((progress.seconds - self._timed.seconds) / steps, 6),
                "wait": round(self._waited / steps, 6),
                "parts": {name: round(s / steps, 6) for name, s in parts.items()},
                "memory": memory,
            }
            self._times.add([line])
        self._waited, self._timed = 0.0, replace(progress)

    def fetch(self, progress: Progress) -> dict[str, float]:
        """Writes the steps since the last call, up to `progress`, and returns the means of their
        losses and the last learning rates. All processes must call it together.
        """
        fetched, rates = self._window.fetch()
        if self.history is not None and self._spikes is not None:
            first = progress.step - len(rates) + 1
            self.history.add_losses(first, fetched.values, rates)
            self._spikes.add(first, progress.position - len(rates) * self._batch, fetched)
        if self._keys is not None:
            self._keys.write()
        means = fetched.values.mean(0, dtype=float).tolist()
        return {**dict(zip(LOSSES, means, strict=True)), **rates[-1]}
