"""A round: starts the command until it finishes, and checks each end and the result."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from configs.errors import PipelineError
from tests.chaos.disk import SmallDisk
from tests.chaos.train.command import Command, Training, shared_files, unused
from tests.chaos.train.compare import differences, not_finite
from tests.chaos.train.faults import (
    damage_newest,
    misreported,
    strike,
    wait_for_end,
    wait_for_step,
)
from tests.chaos.train.inputs import STEPS
from tests.chaos.train.plans import Plan, Start

_ROOM = 20  # checkpoints for which a small disk has room, except while it is full
_FULL = (0.05, 0.9)  # share of a checkpoint for which a full disk has room


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """A run that nothing has stopped. startup: seconds before its first step."""

    output: Path
    startup: float


@dataclass
class Round:
    """Carries out a plan. rng: draws the times. folder: for all files of the round; it is removed
    at the end.

    events: faults that happened, by kind. wrong: what is not as it should be.
    """

    plan: Plan
    rng: random.Random
    preset: Path
    folder: Path
    undisturbed: Undisturbed
    events: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def play(self) -> None:
        began, shared = time.monotonic(), shared_files()
        with ExitStack() as stack:
            command = Command.of(self.preset, self.folder / "out", self.folder)
            disk = None
            if self.plan.on_small_disk:
                largest = max(
                    path.stat().st_size for path in self.undisturbed.output.glob("checkpoint-*/*")
                )
                disk = stack.enter_context(SmallDisk(self.folder / "disk", largest))
                command = replace(command, output=self.folder / "disk/out")
            for start in self.plan.starts:
                if not self.wrong:
                    self._run(start, command, disk)
            if not self.wrong:
                theirs = self.undisturbed.output
                self.wrong += differences(command.output, theirs, STEPS, same=self.plan.same)
            self.wrong += command.remains()
            left = unused(shared_files() - shared, command.pids)
            self.wrong += [f"/dev/shm/{name} is left" for name in sorted(left)]
        shutil.rmtree(self.folder, ignore_errors=True)
        self.seconds = time.monotonic() - began

    def _run(self, start: Start, command: Command, disk: SmallDisk | None) -> None:
        """Runs the command once, until it ends."""
        self.starts += 1
        damaged = damage_newest(command.output, self.rng) if start.damage else None
        before = command.last_step()
        training = command.start(start.layout, self._limit(start, disk))
        happened, reached = False, before
        if start.fault:
            self._wait(start, command, training, before)
            reached = command.last_step()
            happened = strike(start.fault, training, disk, self.rng)
        self.wrong += wait_for_end(training)
        if self.wrong:
            return
        code, text = training.process.returncode, training.text()
        finished = (command.output / "final").is_dir()  # then the fault came too late
        if happened and not finished:
            self.events[start.fault] += 1
            trained_to = reached if reached > before else 0
            self.wrong += misreported(start.fault, training, command, trained_to)
        elif code and not happened:
            self.wrong.append(f"exit status {code}: {text[-1500:]}")
        if damaged is not None and "resuming" in text:
            newest, older = damaged
            self.events["checkpoint damaged"] += 1
            if f"{newest} is damaged" not in text or f"resuming from {older} " not in text:
                self.wrong.append(
                    f"{newest.name} is damaged; not resumed from {older.name}: {text[-1500:]}"
                )
        try:
            self.wrong += not_finite(command.output)
        except PipelineError as error:
            self.wrong.append(f"a checkpoint can't be checked: {error}")

    def _limit(self, start: Start, disk: SmallDisk | None) -> Callable[[], None] | None:
        """Gives the disk room. Returns a preexec_fn that limits files instead, where the disk is no
        file system of its own.
        """
        if disk is None:
            return None
        disk.resize(_ROOM * disk.largest)
        is_full = start.fault == "disk full"
        return disk.limit(self.rng.uniform(*_FULL) if is_full else _ROOM)

    def _wait(self, start: Start, command: Command, training: Training, before: int) -> None:
        """Waits until it is time for the fault."""
        if start.after:
            step = before + max(1, round(start.after * (STEPS - before)))
            wait_for_step(command, training, step, self.rng)
        else:
            time.sleep(self.rng.uniform(0, self.undisturbed.startup))
