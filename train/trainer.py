"""The trainer: from a configuration to OUT/final, through checkpoints from which the same command
goes on.

    OUT/config.yaml  base/ (tiny only)  checkpoint-NNNNNN/  final/  logs/  losses.jsonl  summary.json

A step reads no number back from the device: losses stay there and are fetched together every
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
from configs.schema import TrainConfig
from model.spec import spec_named
from stages.backends.runtime import pin_threads
from train import draws
from train.base import ensure_base
from train.data import BatchMaker, Order, TrainBatch, micro_batches
from train.history import History, summarise
from train.setup import (
    check_config,
    check_same_run,
    flat,
    make_models,
    make_optimizer,
    make_preparation,
)
from train.shards import ShardSet
from train.state import (
    Artefact,
    find_checkpoint,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
    sweep,
    write_adapter,
    write_json,
    write_whole,
)
from train.step import LOSSES, step_losses


class Watcher(Protocol):
    """Who is told how training goes, e.g. a progress bar."""

    def say(self, message: str) -> None: ...

    def step(self, step: int, losses: dict[str, float] | None) -> None:
        """After every step; losses: means over the last `log_every` steps, when they were fetched."""
        ...


@dataclass(slots=True)
class Progress:
    """Where a run is. position: samples consumed, over all processes. seconds: of training, over
    all runs.
    """

    step: int = 0
    position: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended. signal: the one that stopped it, 0 if it reached its last step."""

    step: int
    signal: int
    adapter: Path | None
    summary: dict[str, Any] = field(default_factory=dict)


def train(config: TrainConfig, watcher: Watcher) -> Outcome:
    """Train, or go on training, as configured. Raises PipelineError for what a user can mend."""
    check_config(config)
    return Trainer(config, watcher).run()


class Trainer:
    """One run. Everything is made in `__init__`; `run` trains."""

    def __init__(self, config: TrainConfig, watcher: Watcher) -> None:
        from accelerate import Accelerator
        from accelerate.utils import ProjectConfiguration, set_seed

        pin_threads(config.threads)
        self.config, self.watcher = config, watcher
        self.output = Path(config.output)
        self.shards = ShardSet(config.data, config.split)
        resumed = find_checkpoint(self.output, config.resume_from_checkpoint)
        if resumed is not None:
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
        self.base = self._prepared_output()
        self.frozen, self.trained = make_models(config, self.spec, self.base, self.device)
        self.parameters = [p for p in self.trained.parameters() if p.requires_grad]
        self.optimizer: Any
        self.optimizer, self.schedule = make_optimizer(
            config.optim, config.max_train_steps, self.parameters
        )
        self.progress = Progress()
        if resumed is not None:
            self._resume(resumed)
        # The loader is not prepared: it would split again what the plan has split already
        # (accelerate #3547). Nor is the schedule: accelerate would advance it once for every
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

    # ----------------------------------------------------------------------------------------------

    def _prepared_output(self) -> str:
        """The base to load, once the main process has made the output and, if need be, the tiny
        base.
        """
        base = ""
        if self.is_main:
            self.output.mkdir(parents=True, exist_ok=True)
            sweep(self.output)
            base = ensure_base(self.config, self.spec, self.shards, self.watcher.say)
            dump(self.config, self.output / "config.yaml")
        self.accelerator.wait_for_everyone()
        return base or ensure_base(self.config, self.spec, self.shards, lambda _: None)

    def _resume(self, checkpoint: Path) -> None:
        state = load_checkpoint(checkpoint, self.trained, with_unet=self.config.train_base)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        set_random_state(state["random"], self.accelerator.process_index)
        self.progress = Progress(state["step"], state["position"], state["seconds"])
        self.watcher.say(f"resuming from {checkpoint} at step {self.progress.step:,}")
        if state["data"] != self.shards.digest:
            self.watcher.say(
                f"{self.config.data} has changed since that checkpoint; samples come in its new "
                "order"
            )

    def _batches(self) -> Iterator[TrainBatch]:
        preparation = make_preparation(self.config, self.spec, self.frozen)
        return micro_batches(
            BatchMaker(self.shards, Order(len(self.shards), self.config.seed), preparation),
            start=self.progress.position,
            size=self.config.train_batch_size,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            workers=self.config.num_workers,
            pin=self.device.type == "cuda",
        )

    # ----------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Train to the last step or to a signal, leaving a checkpoint either way."""
        config, progress = self.config, self.progress
        if progress.step >= config.max_train_steps:
            self.watcher.say(
                f"{self.output} is finished: {progress.step:,} steps. Say "
                f"max_train_steps={2 * progress.step} to go on."
            )
            return self._end(0)
        if config.report_to != "none":
            self.accelerator.init_trackers("train", config=flat(asdict(config)))
        window: list[Tensor] = []
        rates: list[float] = []
        with _signals() as stopping:
            batches = self._batches()
            last = time.monotonic()
            while progress.step < config.max_train_steps and not stopping.agreed:
                rates.append(float(self.schedule.get_last_lr()[0]))
                window.append(self._step(batches))
                progress.step += 1
                losses = None
                if progress.step % config.log_every == 0 or progress.step == config.max_train_steps:
                    losses = self._fetch(window, rates)
                    stopping.agreed = self._anyone(stopping.signal)
                elif self.accelerator.num_processes == 1:
                    # with several, all must stop at the same step
                    stopping.agreed = bool(stopping.signal)
                now = time.monotonic()
                progress.seconds, last = progress.seconds + now - last, now
                if (
                    progress.step % config.checkpointing_steps == 0
                    and progress.step < config.max_train_steps
                ):
                    self._save()
                self.watcher.step(progress.step, losses)
            if window:
                self._fetch(window, rates)
            self._save()
        outcome = self._end(stopping.signal if progress.step < config.max_train_steps else 0)
        self.accelerator.end_training()
        return outcome

    def _step(self, batches: Iterator[TrainBatch]) -> Tensor:
        """One step of the optimizer over all its micro-batches; their mean losses (3,), on the
        device.
        """
        config = self.config
        # One draw for the whole step, so that it doesn't depend on the number of processes.
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

    def _fetch(self, window: list[Tensor], rates: list[float]) -> dict[str, float]:
        """Bring the losses of the last steps from the device and write them down; their means.
        Empties both lists.
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

    def _anyone(self, flag: int) -> bool:
        if self.accelerator.num_processes == 1:
            return bool(flag)
        told = self.accelerator.reduce(torch.tensor([float(bool(flag))], device=self.device), "sum")
        return bool(told.item() > 0)

    # ----------------------------------------------------------------------------------------------

    def _artefact(self) -> Artefact:
        base = self.base
        if Path(base).is_relative_to(self.output):
            # from the adapter's folder: a run may be moved
            base = os.path.relpath(base, self.output / "final")
        return Artefact(
            described={
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
                self._artefact(),
                state,
                limit=self.config.checkpoints_total_limit,
            )
        self.accelerator.wait_for_everyone()

    def _end(self, stopped: int) -> Outcome:
        """Write what a run leaves: the summary and, of a finished one, OUT/final."""
        progress, adapter, summary = self.progress, None, {}
        if self.history is not None:
            if not stopped:
                adapter = write_whole(
                    self.output / "final",
                    lambda folder: write_adapter(folder, self.trained, self._artefact()),
                )
            summary = summarise(
                self.history,
                samples=progress.position,
                seconds=progress.seconds,
                finished=not stopped,
            )
            write_json(self.output / "summary.json", summary)
        self.accelerator.wait_for_everyone()
        return Outcome(step=progress.step, signal=stopped, adapter=adapter, summary=summary)


@dataclass(slots=True)
class _Stopping:
    """signal: the one that came, 0 if none. agreed: all processes stop after this step."""

    signal: int = 0
    agreed: bool = False


@contextmanager
def _signals() -> Iterator[_Stopping]:
    """Ctrl-C or SIGTERM ends training after the step it is in; a second one ends the process at
    once.
    """
    stopping = _Stopping()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number: int, _frame: FrameType | None) -> None:
        stopping.signal = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
