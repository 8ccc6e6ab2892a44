"""The trainer: from a configuration to OUT/final, through checkpoints to resume from.

    OUT/config.yaml  base/ (tiny model only)  checkpoint-NNNNNN/  final/  logs/  losses.jsonl
        summary.json

A step reads no value from the device: losses stay there and are fetched together every
`log_every` steps.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from configs.load import dump
from configs.training import TrainConfig
from model.spec import spec_named
from stages.backends.runtime import pin_threads
from train import draws
from train.base import ensure_base
from train.data import BatchMaker, SampleOrder, TrainBatch, micro_batches
from train.history import History, summarise
from train.setup import (
    check_config,
    check_same_run,
    flatten,
    make_models,
    make_optimizer,
    make_preparation,
)
from train.shards import ShardSet
from train.state import (
    AdapterExtras,
    find_checkpoint,
    load_checkpoint,
    random_state,
    remove_partial_folders,
    save_checkpoint,
    set_random_state,
    write_adapter,
    write_folder_atomically,
    write_json,
)
from train.step import LOSSES, step_losses


class Watcher(Protocol):
    """Receives the messages and the progress of a run, e.g. a progress bar."""

    def message(self, text: str) -> None:
        """Called with a line for the user."""
        ...

    def step(self, step: int, losses: dict[str, float] | None) -> None:
        """Called after every step.

        losses: means over the last `log_every` steps; None after steps that don't fetch them.
        """
        ...


@dataclass(slots=True)
class Progress:
    """The progress of a run, including the runs that it resumed.

    position: samples consumed by all processes. seconds: of training.
    """

    step: int = 0
    position: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of a run.

    signal: number of the signal that stopped it, 0 if it reached its last step. adapter: OUT/final,
    None if it was stopped. summary: the contents of summary.json, empty on other processes than
    the main one.
    """

    step: int
    signal: int
    adapter: Path | None
    summary: dict[str, Any] = field(default_factory=dict)


def train(config: TrainConfig, watcher: Watcher) -> Outcome:
    """Starts or resumes a run. Raises PipelineError for wrong settings, data or weights."""
    check_config(config)
    return Trainer(config, watcher).run()


class Trainer:
    """A run. `__init__` loads data and models and resumes from a checkpoint; `run` trains."""

    def __init__(self, config: TrainConfig, watcher: Watcher) -> None:
        from accelerate import Accelerator
        from accelerate.utils import ProjectConfiguration, set_seed

        pin_threads(config.threads)
        self.config, self.watcher = config, watcher
        self.output = Path(config.output)
        self.shards = ShardSet(config.data, config.split)
        checkpoint = find_checkpoint(self.output, config.resume_from_checkpoint)
        if checkpoint is not None:
            check_same_run(config, self.output / "config.yaml")
        self.accelerator = Accelerator(
            cpu=config.model.device == "cpu",
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=None if config.report_to == "none" else config.report_to,
            project_config=ProjectConfiguration(
                project_dir=str(self.output),
                logging_dir=str(self.output / "logs"),
                automatic_checkpoint_naming=False,
            ),
        )
        set_seed(config.seed)
        self.spec = spec_named(config.model.spec)
        self.base = self._prepare_output()
        self.frozen, self.trained = make_models(config, self.spec, self.base, self.device)
        self.parameters = [p for p in self.trained.parameters() if p.requires_grad]
        self.optimizer: Any
        self.optimizer, self.schedule = make_optimizer(
            config.optim, config.max_train_steps, self.parameters
        )
        self.progress = Progress()
        if checkpoint is not None:
            self._resume(checkpoint)
        # The loader is not passed to `prepare`, which would split its batches a second time
        # (accelerate #3547). Neither is the schedule: accelerate would advance it once for every
        # process.
        self.model, self.optimizer = self.accelerator.prepare(self.trained, self.optimizer)
        self.history = (
            History(self.output / "losses.jsonl", step=self.progress.step) if self.is_main else None
        )

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    def _prepare_output(self) -> str:
        """Makes the output folder and, where it is needed, the tiny base; returns the base to load.

        The main process makes them; the others wait for it.
        """
        base = ""
        if self.is_main:
            self.output.mkdir(parents=True, exist_ok=True)
            remove_partial_folders(self.output)
            base = ensure_base(self.config, self.spec, self.shards, self.watcher.message)
            dump(self.config, self.output / "config.yaml")
        self.accelerator.wait_for_everyone()
        return base or ensure_base(self.config, self.spec, self.shards, lambda _: None)

    def _resume(self, checkpoint: Path) -> None:
        state = load_checkpoint(checkpoint, self.trained, with_unet=self.config.train_base)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        set_random_state(state["random"], self.accelerator.process_index)
        self.progress = Progress(state["step"], state["position"], state["seconds"])
        self.watcher.message(f"resuming from {checkpoint} at step {self.progress.step:,}")
        if state["data"] != self.shards.digest:
            self.watcher.message(
                f"{self.config.data} has changed since that checkpoint; "
                "samples come in another order from here"
            )

    def _batches(self) -> Iterator[TrainBatch]:
        preparation = make_preparation(self.config, self.spec, self.frozen)
        return micro_batches(
            BatchMaker(self.shards, SampleOrder(len(self.shards), self.config.seed), preparation),
            start=self.progress.position,
            size=self.config.train_batch_size,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            workers=self.config.num_workers,
            pin=self.device.type == "cuda",
        )

    def run(self) -> Outcome:
        """Train until the last step or a signal, and write a checkpoint in both cases."""
        config, progress = self.config, self.progress
        if progress.step >= config.max_train_steps:
            self.watcher.message(
                f"{self.output} is finished: {progress.step:,} steps. To continue, set "
                f"max_train_steps={2 * progress.step}."
            )
            return self._finish(0)
        if config.report_to != "none":
            self.accelerator.init_trackers("train", config=flatten(asdict(config)))
        window: list[Tensor] = []
        rates: list[float] = []
        with _stop_on_signal() as stop:
            batches = self._batches()
            last = time.monotonic()
            while progress.step < config.max_train_steps and not stop.agreed:
                rates.append(float(self.schedule.get_last_lr()[0]))
                window.append(self._step(batches))
                progress.step += 1
                losses = None
                if progress.step % config.log_every == 0 or progress.step == config.max_train_steps:
                    losses = self._fetch_losses(window, rates)
                    stop.agreed = self._any_process(stop.signal)
                elif self.accelerator.num_processes == 1:
                    # Several processes must stop at the same step, so they only agree above.
                    stop.agreed = bool(stop.signal)
                now = time.monotonic()
                progress.seconds, last = progress.seconds + now - last, now
                if (
                    progress.step % config.checkpointing_steps == 0
                    and progress.step < config.max_train_steps
                ):
                    self._save()
                self.watcher.step(progress.step, losses)
            if window:
                self._fetch_losses(window, rates)
            self._save()
        outcome = self._finish(stop.signal if progress.step < config.max_train_steps else 0)
        self.accelerator.end_training()
        return outcome

    def _step(self, batches: Iterator[TrainBatch]) -> Tensor:
        """Takes one optimizer step over its micro-batches.

        Returns the mean losses (3,), on the device.
        """
        config = self.config
        # Drawn once for the step, so that it doesn't depend on the number of processes.
        mask = draws.uniform(config.seed, "mask", self.progress.step) < config.loss.mask_loss_prob
        values: list[Tensor] = []
        for _ in range(config.gradient_accumulation_steps):
            batch = next(batches).to(self.device)
            with self.accelerator.accumulate(self.model):
                losses = step_losses(self.model, self.frozen, batch, config.loss, mask=mask)
                self.accelerator.backward(losses.total)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.parameters, config.optim.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            values.append(losses.values)
            self.progress.position += config.train_batch_size * self.accelerator.num_processes
        self.schedule.step()
        return torch.stack(values).mean(0)

    def _fetch_losses(self, window: list[Tensor], rates: list[float]) -> dict[str, float]:
        """Fetches the losses of the last steps, records them, and returns their means.

        window: (3,) for each step; rates: their learning rates. Both lists are emptied.
        """
        values: list[list[float]] = self.accelerator.reduce(torch.stack(window), "mean").tolist()
        means = {name: sum(row[i] for row in values) / len(values) for i, name in enumerate(LOSSES)}
        if self.history is not None:
            self.history.add(self.progress.step - len(values) + 1, values, rates)
        if self.config.report_to != "none":
            self.accelerator.log({**means, "lr": rates[-1]}, step=self.progress.step)
        window.clear()
        rates.clear()
        return means

    def _any_process(self, flag: int) -> bool:
        """Returns whether `flag` is non-zero on any process."""
        if self.accelerator.num_processes == 1:
            return bool(flag)
        own = torch.tensor([float(bool(flag))], device=self.device)
        return bool(self.accelerator.reduce(own, "sum").item() > 0)

    def _extras(self) -> AdapterExtras:
        base = self.base
        if Path(base).is_relative_to(self.output):
            # relative to the adapter's folder, so that the run can be moved
            base = os.path.relpath(base, self.output / "final")
        return AdapterExtras(
            metadata={
                "step": self.progress.step,
                "position": self.progress.position,
                "base": base,
                "data": self.shards.digest,
                "train": asdict(self.config),
            },
            dataset=self.shards.dataset_config(),
            with_unet=self.config.train_base,
        )

    def _save(self) -> None:
        from accelerate.utils import gather_object

        random: list[dict[str, Any]] = gather_object([random_state()])
        if self.is_main:
            state = {
                **asdict(self.progress),
                "data": self.shards.digest,
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "random": random,
            }
            save_checkpoint(
                self.output,
                self.progress.step,
                self.trained,
                self._extras(),
                state,
                limit=self.config.checkpoints_total_limit,
            )
        self.accelerator.wait_for_everyone()

    def _finish(self, stop_signal: int) -> Outcome:
        """Writes the summary and, unless a signal stopped the run, OUT/final."""
        progress, adapter, summary = self.progress, None, {}
        if self.history is not None:
            if not stop_signal:
                adapter = write_folder_atomically(
                    self.output / "final",
                    lambda folder: write_adapter(folder, self.trained, self._extras()),
                )
            summary = summarise(
                self.history,
                samples=progress.position,
                seconds=progress.seconds,
                finished=not stop_signal,
            )
            write_json(self.output / "summary.json", summary)
        self.accelerator.wait_for_everyone()
        return Outcome(step=progress.step, signal=stop_signal, adapter=adapter, summary=summary)


@dataclass(slots=True)
class _Stop:
    """Whether to stop training.

    signal: number of the signal received, 0 for none. agreed: all processes stop after this step.
    """

    signal: int = 0
    agreed: bool = False


@contextmanager
def _stop_on_signal() -> Iterator[_Stop]:
    """Records SIGINT (Ctrl-C) or SIGTERM, so that training stops after the current step.

    The previous handlers are restored at the first signal, so a second one ends the process at
    once, and at exit.
    """
    stop = _Stop()
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def on_signal(number: int, _frame: FrameType | None) -> None:
        stop.signal = number
        restore()

    for number in previous:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        restore()
