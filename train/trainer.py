"""The trainer: from a configuration to OUT/final, through checkpoints to resume from.

    OUT/config.yaml  base/ (tiny model only)  checkpoint-NNNNNN/  final/  logs/  losses.jsonl
        skipped.jsonl  nonfinite.jsonl  summary.json

A step waits for no value of its own: losses stay on the device and are fetched together every
`log_every` steps, and its facts (train/facts.py) are read when the next step has been started.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import ConfigError
from configs.load import dump
from configs.training import TrainConfig
from model.spec import spec_named
from stages.backends.runtime import pin_threads
from stages.storage.lock import RunLock
from stages.storage.store import Store
from train import draws
from train.base import ensure_base
from train.batches import plan_batches
from train.data import BatchMaker, micro_batches, unpacked
from train.facts import Limits, StepCheck, StepFacts
from train.history import HISTORY, History, summarise
from train.order import SampleOrder
from train.outcome import Outcome, Progress, Watcher
from train.packing import PackedBatch, check_shared_memory
from train.processes import join_processes
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
from train.stopping import Stop, Stopping, stop_on_signal


def train(config: TrainConfig, watcher: Watcher, stopping: Stopping = stop_on_signal) -> Outcome:
    """Starts or resumes a run. Raises PipelineError for wrong settings, data or weights.

    stopping: a context manager whose Stop tells when to stop.
    """
    check_config(config)
    with ExitStack() as stack:
        return Trainer(config, watcher, stack).run(stopping)


class Trainer:
    """A run. `__init__` loads data and models and resumes from a checkpoint; `run` trains. stack:
    keeps the lock of the output until it is closed.
    """

    def __init__(self, config: TrainConfig, watcher: Watcher, stack: ExitStack) -> None:
        from accelerate.utils import set_seed

        pin_threads(config.threads)
        self.config, self.watcher = config, watcher
        self.output = Path(config.output)
        self.shards = ShardSet(config.data, config.split)
        checkpoint = find_checkpoint(self.output, config.resume_from_checkpoint, watcher.message)
        if checkpoint is not None:
            check_same_run(config, checkpoint)
        self.accelerator = join_processes(config, self.output)
        self.batch = plan_batches(
            config.global_batch_size, config.micro_batch_size, self.accelerator.num_processes
        )
        if len(self.shards) < self.batch.size:
            raise ConfigError(
                f"{config.data} has {len(self.shards)} samples, fewer than global_batch_size="
                f"{self.batch.size}: a step would train on some of them twice. Lower "
                "global_batch_size, or make a larger data set."
            )
        self.order = SampleOrder([len(self.shards)], config.seed)
        set_seed(config.seed)
        self.spec = spec_named(config.model.spec)
        if self.is_main:
            self.output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(RunLock(Store(str(self.output))))
        self.base = self._prepare_output()
        self.frozen, self.trained = make_models(config, self.spec, self.base, self.device)
        self.preparation = make_preparation(config, self.spec, self.frozen)
        self.parameters = [p for p in self.trained.parameters() if p.requires_grad]
        self.optimizer: Any
        self.optimizer, self.schedule = make_optimizer(
            config.optim, config.max_train_steps, self.parameters
        )
        self.progress = Progress()
        if checkpoint is not None:
            state = self._resume(checkpoint)
        # The loader is not passed to `prepare`, which would split its batches a second time
        # (accelerate #3547). Neither is the schedule: accelerate would advance it once for every
        # process.
        self.model, self.optimizer = self.accelerator.prepare(self.trained, self.optimizer)
        if self.accelerator.scaler is not None and checkpoint is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.history = (
            History(self.output / HISTORY, step=self.progress.step) if self.is_main else None
        )
        if self.is_main:
            watcher.message(f"{self.batch}, on {self.device.type}")

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
            remove_partial_folders(self.output)
            base = ensure_base(self.config, self.spec, self.shards, self.watcher.message)
            dump(self.config, self.output / "config.yaml")
        self.accelerator.wait_for_everyone()
        return base or ensure_base(self.config, self.spec, self.shards, lambda _: None)

    def _resume(self, checkpoint: Path) -> dict[str, Any]:
        """Restores a checkpoint, except for what `prepare` makes; returns its state."""
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
        return {"scaler": {}, **state}

    def _batches(self) -> Iterator[PackedBatch]:
        check_shared_memory(
            size=self.batch.micro,
            workers=self.config.num_workers,
            resolution=self.config.resolution,
            side=self.spec.vision_size,
        )
        return micro_batches(
            BatchMaker(self.shards, self.order, self.preparation),
            start=self.progress.position,
            size=self.batch.micro,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            workers=self.config.num_workers,
            pin=self.device.type == "cuda",
        )

    def run(self, stopping: Stopping = stop_on_signal) -> Outcome:
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
        check = self._step_check()
        window: list[Tensor] = []
        rates: list[float] = []
        previous: StepFacts | None = None
        with stopping() as stop:
            batches = self._batches()
            last = time.monotonic()
            while progress.step < config.max_train_steps and not stop.agreed:
                rates.append(float(self.schedule.get_last_lr()[0]))
                step_facts, losses_of_step = self._step(batches, stop)
                window.append(losses_of_step)
                progress.step += 1
                ends = progress.step == config.max_train_steps
                saves = progress.step % config.checkpointing_steps == 0 or ends
                if previous is not None:
                    stop.agreed = check.check(previous)
                previous = step_facts
                if self.accelerator.num_processes == 1:
                    stop.agreed = stop.agreed or bool(stop.signal)
                losses = None
                if progress.step % config.log_every == 0 or saves or stop.agreed:
                    losses = self._fetch_losses(window, rates)
                now = time.monotonic()
                progress.seconds, last = progress.seconds + now - last, now
                if saves or stop.agreed:
                    stop.agreed = check.check(previous) or stop.agreed
                    previous = None
                    self._save()
                self.watcher.step(progress.step, losses)
        stopped = progress.step < config.max_train_steps
        outcome = self._finish((stop.signal or signal.SIGTERM) if stopped else 0)
        self.accelerator.end_training()
        return outcome

    def _step_check(self) -> StepCheck:
        from accelerate.utils import gather_object

        limits = Limits(
            batch=self.batch.size,
            samples=len(self.shards),
            bad_share=self.config.max_bad_share,
            nonfinite_steps=self.config.max_nonfinite_steps,
        )
        return StepCheck(
            self.output,
            self.progress.step,
            limits,
            lambda position: self.shards.keys[self.order.sample(position)],
            gather_object,
            self.watcher.message if self.is_main else None,
        )

    def _step(self, batches: Iterator[PackedBatch], stop: Stop) -> tuple[StepFacts, Tensor]:
        """Takes one optimizer step over its micro-batches. An update with a gradient that isn't
        finite is skipped, which the device decides.

        Returns the step's facts, and this process's part of the losses (3,), on the device; the
        parts of all processes add up to the losses.
        """
        config, progress, world = self.config, self.progress, self.batch.world
        # Drawn once for the step, so that it doesn't depend on the number of processes.
        mask = draws.uniform(config.seed, "mask", progress.step) < config.loss.mask_loss_prob
        micro = [next(batches) for _ in range(self.batch.accumulation)]
        own = [float(sum(int(b.valid.sum()) for b in micro)), float(bool(stop.signal))]
        numbers: Tensor = self.accelerator.reduce(torch.tensor(own, device=self.device), "sum")
        values: list[Tensor] = []
        for index, batch in enumerate(micro):
            is_last = index == len(micro) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                losses = step_losses(
                    self.model,
                    self.frozen,
                    unpacked(batch, self.preparation, self.device),
                    config.loss,
                    mask=mask,
                    count=numbers[0],
                )
                # the processes' gradients are averaged, and should be added
                self.accelerator.backward(losses.total * world)
            values.append(losses.values)
        norm = self.accelerator.clip_grad_norm_(self.parameters, config.optim.max_grad_norm)
        skipped = (~torch.isfinite(norm)).float()
        self.optimizer.optimizer.found_inf = skipped  # the fused AdamW does nothing where it is 1
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        bad = tuple(sample for batch in micro for sample in batch.bad)
        step_facts = StepFacts(
            progress.step + 1, progress.position, torch.cat((numbers, skipped[None])), bad
        )
        progress.position += self.batch.size
        return step_facts, torch.stack(values).sum(0)

    def _fetch_losses(self, window: list[Tensor], rates: list[float]) -> dict[str, float]:
        """Fetches the losses of the last steps, records them, and returns their means.

        window: (3,) for each step; rates: their learning rates. Both lists are emptied.
        """
        values: list[list[float]] = self.accelerator.reduce(torch.stack(window), "sum").tolist()
        means = {name: sum(row[i] for row in values) / len(values) for i, name in enumerate(LOSSES)}
        if self.history is not None:
            self.history.add_losses(self.progress.step - len(values) + 1, values, rates)
        if self.config.report_to != "none":
            self.accelerator.log({**means, "lr": rates[-1]}, step=self.progress.step)
        window.clear()
        rates.clear()
        return means

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
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
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
