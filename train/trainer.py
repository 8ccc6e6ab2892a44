"""The trainer: from a configuration to OUT/final, through checkpoints to resume from.

    OUT/config.yaml  base/ (tiny model only)  checkpoint-NNNNNN/  final/  index/  logs/  report/
        validation/  summary.json
        {data,losses,times,validation,keys,spikes,skipped,nonfinite}.jsonl

If OUT is on an object store, these files are in a local folder first (train/mirror.py).

A step waits for no value of its own: losses stay on the device and are fetched together every
`log_every` steps, and its facts (train/facts.py) are read when the next step has been started.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import ConfigError
from configs.training import TrainConfig
from model.spec import spec_named
from stages.backends.runtime import deterministic_algorithms, pin_threads
from train.batch_maker import BatchMaker
from train.batches import plan_batches
from train.data import unpacked
from train.facts import HostCopy, Limits, StepCheck, StepFacts
from train.features.reading import open_features
from train.flops import sample_flops
from train.history import summarise
from train.loader import micro_batches
from train.mirror import open_output
from train.mixture import open_mixture
from train.optimization import Optimization
from train.outcome import Outcome, Progress, Watcher
from train.output import prepare_output
from train.packing import PackedBatch, check_shared_memory
from train.processes import join_processes, peak_memory
from train.records import StepRecords, spike_context, start_trackers
from train.report import write_report
from train.resume import (
    Samples,
    agreed_checkpoint,
    agreed_samples,
    choose_checkpoint,
    start_of_run,
)
from train.saving import Saver
from train.segments import add_segment, new_segment
from train.setup import check_config, make_buckets, make_models, make_preparation
from train.sharding import is_sharded, prepare, shard, without_sync
from train.shards import INDEX
from train.state import load_checkpoint, set_random_state, write_json
from train.step import StepLosses, group_gradients, masks_background, step_losses
from train.stopping import Stop, Stopping, stop_on_signal
from train.validation import open_held_out, open_validator
from train.writer import CheckpointWriter


def train(config: TrainConfig, watcher: Watcher, stopping: Stopping = stop_on_signal) -> Outcome:
    """Starts or resumes a run. Raises PipelineError for wrong settings, data or weights.

    stopping: a context manager whose Stop tells when to stop.
    """
    check_config(config)
    with ExitStack() as stack:
        return Trainer(config, watcher, stack).run(stopping)


class Trainer:
    """A run. `__init__` loads data and models and resumes from a checkpoint; `run` trains. stack:
    ends the use of the output and torch's mode.
    """

    def __init__(self, config: TrainConfig, watcher: Watcher, stack: ExitStack) -> None:
        from accelerate.utils import set_seed

        pin_threads(config.threads)
        stack.enter_context(deterministic_algorithms(config.deterministic))
        self.config, self.watcher = config, watcher
        self.output, self.mirror = open_output(config)
        self.accelerator = join_processes(config, self.output)
        # the first process makes the index, and the first of a node where it has no such file
        with self.accelerator.main_process_first(), self.accelerator.local_main_process_first():
            if self.mirror is not None and self.accelerator.is_local_main_process:
                self.mirror.fetch_indexes()
            self.mixture = open_mixture(config, self.output / INDEX)
            tell = watcher.message if self.is_main else lambda _: None
            self.features = open_features(config, self.mixture, self.output / INDEX, tell)
            self.held_out = open_held_out(config, self.output / INDEX)
        self.samples = agreed_samples(Samples.of(self.mixture, self.features))
        self.batch = plan_batches(
            config.global_batch_size, config.micro_batch_size, self.accelerator.num_processes
        )
        self.mixture.check_step(self.batch.size)
        set_seed(config.seed)
        self.spec = spec_named(config.model.spec, config.model.without)
        self.writer: CheckpointWriter | None = None
        if self.is_main:
            limit = config.checkpoints_total_limit
            self.writer = CheckpointWriter(self.output, limit, watcher.message, self.mirror)
            stack.enter_context(self.writer)
        choose = partial(
            choose_checkpoint, config, self.samples, self.output, self.mirror, watcher.message
        )
        self.checkpoint = checkpoint = agreed_checkpoint(choose if self.is_main else None)
        base = prepare_output(
            config,
            self.output,
            self.spec,
            checkpoint,
            self.accelerator,
            self.writer,
            self.mirror,
            watcher.message,
        )
        say = tell if checkpoint is None else lambda _: None
        self.frozen, self.trained = make_models(
            config, self.spec, base, self.device, self.samples.embedder, say, self.features
        )
        self.buckets = make_buckets(config, self.mixture, self.frozen.base)
        self.order = self.mixture.order(config.seed, self.buckets)
        self.preparation = make_preparation(config, self.spec, self.frozen, self.buckets)
        state = {} if checkpoint is None else load_checkpoint(checkpoint, self.trained)
        shard(self.trained, self.accelerator)
        self.optimization, self.progress = Optimization(config, self.trained.adapter), Progress()
        if checkpoint is not None:
            self._resume(checkpoint, state)
        # Not passed to accelerate: the loader, whose batches it would split (accelerate #3547), and
        # the schedule, which it would advance once for every process.
        self.model, self.optimization.optimizer = prepare(
            self.accelerator, self.trained, self.optimization.optimizer
        )
        if self.accelerator.scaler is not None and state.get("scaler"):
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self._open_records(base, state)

    def _open_records(self, base: str, state: Mapping[str, Any]) -> None:
        """Makes what saves, validates and records. base: of the run. state: of the checkpoint."""
        config, watcher = self.config, self.watcher
        self.saver = Saver(
            config=config,
            output=self.output,
            base=base,
            samples=self.samples,
            start=start_of_run(config, self.checkpoint),
            mixture=self.mixture,
            trained=self.trained,
            optimization=self.optimization,
            accelerator=self.accelerator,
            writer=self.writer,
        )
        self.validator = open_validator(
            config,
            self.held_out,
            self.output,
            self.progress.step,
            self.accelerator,
            self.frozen,
            self.preparation,
            watcher.message,
        )
        self.records = StepRecords(
            self.progress,
            spike_context(
                config, self.output, self.batch.size, self.mixture, self.order, watcher.message
            ),
            self.batch.accumulation,
            self.accelerator,
            is_main=self.is_main,
            keys=config.log_keys,
            spikes=state.get("spikes"),
        )

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        return torch.device(self.accelerator.device)

    def _resume(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Restores a checkpoint's state, except for what `prepare` makes."""
        self.optimization.load_state_dict(state)
        set_random_state(state["random"], self.accelerator.process_index)
        position = self.order.step_start(state["position"])  # the size of a step may have changed
        self.progress = Progress(state["step"], position, state["seconds"])
        self.watcher.message(f"resuming from {checkpoint} at step {self.progress.step:,}")

    def _batches(self) -> Generator[PackedBatch, None, None]:
        check_shared_memory(
            size=self.batch.micro,
            workers=self.config.num_workers,
            unread=0 if self.device.type == "cuda" else self.batch.accumulation,
            resolution=self.config.resolution,
            side=self.spec.vision_size,
            features={name: each.kind.bytes_per_sample for name, each in self.features.items()},
        )
        maker = BatchMaker(self.mixture, self.order, self.preparation, self.features)
        return micro_batches(
            maker.fetch,
            maker.make,
            start=self.progress.position,
            size=self.batch.micro,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            workers=self.config.num_workers,
            ahead=self.config.read_ahead,
            pin=self.device.type == "cuda",
        )

    def _grouped(self, batches: Iterator[PackedBatch]) -> Iterator[PackedBatch]:
        """Returns the batches, after `group_gradients` with the first one."""
        if self.batch.world == 1:
            return batches
        first = next(batches)
        batch = unpacked(first, self.preparation, self.device)
        group_gradients(self.model, self.frozen, batch, self.config.loss, self.accelerator.backward)
        self.optimization.optimizer.zero_grad()
        return chain([first], batches)

    def run(self, stopping: Stopping = stop_on_signal) -> Outcome:
        """Train until the last step or a signal, and write a checkpoint in both cases."""
        config, progress = self.config, self.progress
        if progress.step >= config.max_train_steps:
            self.watcher.message(
                f"{self.output} is finished: {progress.step:,} steps. To continue, set "
                f"max_train_steps={2 * progress.step}."
            )
            with stopping() as stop:
                self._validate(stop)
                return self._finish(stop)
        check = self._begin()
        previous: StepFacts | None = None
        with stopping() as stop, closing(self._batches()) as loaded:
            self._validate(stop)  # what a stopped run left out
            batches = self._grouped(loaded)
            last = time.monotonic()
            while progress.step < config.max_train_steps and not stop.agreed:
                step_facts = self._step(batches, stop)
                progress.step += 1
                ends = progress.step == config.max_train_steps
                saves = progress.step % config.checkpointing_steps == 0 or ends
                if previous is not None:
                    stop.agreed = check.check(previous)
                previous = step_facts
                if self.writer is not None:
                    self.writer.check()
                stop.agreed = stop.agreed or (self.batch.world == 1 and bool(stop.signal))
                validates = self.validator.is_due(progress.step)
                logs = progress.step % config.log_every == 0 or saves or validates or stop.agreed
                losses = self._fetch_losses() if logs else None
                now = time.monotonic()
                progress.seconds, last = progress.seconds + now - last, now
                if losses is not None:
                    self.records.add_times(progress, peak_memory(self.device))
                if saves or stop.agreed:
                    self._save(check, previous, stop)
                    previous = None
                last += self._validate(stop)
                if stop.agreed and previous is not None:  # a signal during the validation
                    self._save(check, previous, stop)
                self.watcher.step(progress.step, losses)
            return self._finish(stop)

    def _save(self, check: StepCheck, last: StepFacts, stop: Stop) -> None:
        """Writes a checkpoint, after the check of the last step."""
        stop.agreed = check.check(last) or stop.agreed
        self.saver.save(self.progress, self.records.state())

    def _validate(self, stop: Stop) -> float:
        """Validates, if that is due and wasn't done. Returns the seconds that it took."""
        began, step = time.monotonic(), self.progress.step
        if self.validator.is_due(step) and not stop.agreed:
            self.validator.validate(step, self.trained, self.optimization.average, stop)
            self._report()
        return time.monotonic() - began

    def _report(self) -> None:
        if self.is_main:
            try:
                write_report(self.output)
            except (ConfigError, OSError, ValueError) as error:  # no reason to end a run
                self.watcher.message(f"the report can't be written: {error}")

    def _begin(self) -> StepCheck:
        """Announces and records on what the run trains; returns the check of its steps."""
        from accelerate.utils import gather_object

        config = self.config
        if self.is_main:
            how = ", sharded" if is_sharded(self.model) else ""
            batch = f"{self.batch}, on {self.device.type}{how}"
            data = self.mixture.message(), str(self.buckets or "")
            for text in (*data, batch, self.optimization.summary()):
                if text:
                    self.watcher.message(text)
            segment = new_segment(
                config,
                self.progress,
                self.batch,
                self.mixture,
                self.device,
                self.checkpoint,
                features=self.samples.features,
                buckets=self.buckets.sizes if self.buckets else (),
                sample_flops=sample_flops(config, self.spec, self.frozen.base),
            )
            add_segment(self.output, segment)
        start_trackers(config, self.accelerator)
        return StepCheck(
            self.output,
            self.progress.step,
            Limits.of(config, len(self.mixture)),
            lambda position: self.mixture.keys_at(self.order, position),
            gather_object,
            self.watcher.message if self.is_main else None,
        )

    def _step(self, batches: Iterator[PackedBatch], stop: Stop) -> StepFacts:
        """Takes one optimizer step over its micro-batches. An update with a gradient that isn't
        finite is skipped, which the device decides.
        """
        config, progress, world = self.config, self.progress, self.batch.world
        rates = self.optimization.rates()
        mask = masks_background(config.loss, config.seed, progress.step + 1)
        began = time.monotonic()
        micro = [next(batches) for _ in range(self.batch.accumulation)]
        waited = time.monotonic() - began
        own = [float(sum(int(b.valid.sum()) for b in micro)), float(bool(stop.signal))]
        local = torch.tensor(own).to(self.device, non_blocking=True)
        numbers: Tensor = self.accelerator.reduce(local, "sum")
        losses_of_micro: list[StepLosses] = []
        mark = self.records.clock.mark
        mark("")
        for index, batch in enumerate(micro):
            is_last = index == len(micro) - 1
            with nullcontext() if is_last else without_sync(self.accelerator, self.model):
                losses = step_losses(
                    self.model,
                    self.frozen,
                    unpacked(batch, self.preparation, self.device),
                    config.loss,
                    mask=mask,
                    count=numbers[0],
                    mark=mark,
                )
                # the processes' gradients are averaged, and should be added
                self.accelerator.backward(losses.total * world)
                mark("backward")
            losses_of_micro.append(losses)
        skipped = self.optimization.step(self.accelerator)
        mark("optimizer")
        bad = tuple(sample for batch in micro for sample in batch.bad)
        self.records.add(progress.step + 1, micro, losses_of_micro, rates, waited)
        copy = HostCopy(torch.cat((numbers, skipped[None])))
        step_facts = StepFacts(progress.step + 1, progress.position, copy, bad)
        progress.position += self.batch.size
        return step_facts

    def _fetch_losses(self) -> dict[str, float]:
        """Records the losses of the last steps, and returns their means."""
        means = self.records.fetch(self.progress)
        if self.config.report_to != "none":
            self.accelerator.log(means, step=self.progress.step)
        return means

    def _finish(self, stop: Stop) -> Outcome:
        """Waits for the last checkpoint; writes the summary and, unless a signal stopped the run
        before its last step or its last validation, OUT/final.
        """
        progress, summary = self.progress, {}
        validates = stop.agreed and self.validator.is_due(progress.step)
        complete = progress.step >= self.config.max_train_steps and not validates
        stop_signal = 0 if complete else stop.signal or signal.SIGTERM
        if self.records.history is not None and self.writer is not None:
            self.writer.wait()
            summary = summarise(
                self.records.history,
                samples=progress.position,
                seconds=progress.seconds,
                finished=not stop_signal,
            )
        adapter = None if stop_signal else self.saver.write_final(progress, summary)
        if self.writer is not None:
            write_json(self.output / "summary.json", summary)
            self._report()
            self.writer.finish(progress.step, with_final=not stop_signal)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return Outcome(step=progress.step, signal=stop_signal, adapter=adapter, summary=summary)
