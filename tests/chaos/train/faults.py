"""Faults of a start: signals to its processes, and a full disk. What must follow from them."""

from __future__ import annotations

import random
import re
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.chaos.disk import SmallDisk
from tests.chaos.train.command import Command, Training
from train.checkpoints import checkpoint_name, checkpoints, damage

_LIMIT = 180.0  # seconds for a start; a longer one counts as hanging
_JITTER = 0.7  # seconds, at most, between a step and the fault that waits for it
_SIGNALS = {"SIGTERM to all": signal.SIGTERM, "SIGINT to a rank": signal.SIGINT}
_STOPPED = re.compile(r"stopped after step ([\d,]+)")


def wait_for_step(command: Command, training: Training, step: int, rng: random.Random) -> None:
    """Waits until a step is recorded, and then a random time."""
    training.wait(lambda: command.last_step() >= step, _LIMIT)
    time.sleep(rng.uniform(0, _JITTER))


def strike(fault: str, training: Training, disk: SmallDisk | None, rng: random.Random) -> bool:
    """Lets the fault happen. Returns False if the start has ended before."""
    try:
        if not training.is_running():
            return False
        if fault == "rank killed":
            rng.choice(training.ranks()).kill()
        elif fault == "all killed":
            for process in training.everything():
                _send(process, signal.SIGKILL)
        elif fault == "SIGTERM to all":
            for process in training.everything():
                _send(process, signal.SIGTERM)
        elif fault == "SIGINT to a rank":
            rng.choice(training.ranks()).send_signal(signal.SIGINT)
        elif disk is not None and disk.is_mounted:
            _keep_full(training, disk, rng.uniform(0.05, 0.9))
    except (psutil.NoSuchProcess, IndexError):
        return False
    return True


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _keep_full(training: Training, disk: SmallDisk, share: float) -> None:
    """Leaves room for a share of a checkpoint, until the start has ended."""
    room = int(share * disk.largest)
    smallest = sys.maxsize

    def shrink() -> bool:
        nonlocal smallest
        full = shutil.disk_usage(disk.folder).used + room
        if full < smallest:
            with suppress(RuntimeError):  # more has been written meanwhile
                disk.resize(full)
                smallest = full
        return False

    training.wait(shrink, _LIMIT)


def wait_for_end(training: Training) -> list[str]:
    """Waits until a start has ended; returns a fault if it hangs."""
    if not training.wait(lambda: False, _LIMIT):
        return []
    for process in training.everything():
        _send(process, signal.SIGKILL)
    training.process.wait()
    return [f"a start has not ended after {_LIMIT:.0f} s: {training.text()[-600:]}"]


def misreported(fault: str, training: Training, command: Command, before: int) -> list[str]:
    """Returns faults of how a start ended after a fault: its exit status, what it printed, and
    steps that it lost.

    before: the last recorded step when a signal was sent.
    """
    text, several = training.text(), training.layout.processes > 1
    code = training.process.returncode
    number = _SIGNALS.get(fault)
    stopped = {int(step.replace(",", "")) for step in _STOPPED.findall(text)}
    expected: set[int]
    if fault == "all killed":
        expected = {-signal.SIGKILL}
    elif several:  # torch's launcher exits 1 whatever its processes do, once it handles signals
        expected = {1} if before or number is None else {1, -number}
    elif fault == "rank killed":
        expected = {-signal.SIGKILL}
    elif number is not None:  # before the first step, the signal ends the process
        expected = {128 + number} if stopped or before else {128 + number, -number}
    else:
        expected = {2}
    faults = [] if code in expected else [f"exit status {code}, expected {sorted(expected)}"]
    # with several processes, the launcher and those that wait for the first one report errors too
    if fault == "disk full" and ("error: " not in text or ("Traceback" in text and not several)):
        faults.append("the full disk is not reported in one line")
    if number is not None and stopped:
        faults += _lost(stopped, before, command.output)
    if number is not None and before and not stopped:
        faults.append(f"the signal after step {before} stopped no process with a checkpoint")
    return [f"after {fault}: {line}: {text[-1500:]}" for line in faults]


def _lost(stopped: set[int], before: int, output: Path) -> list[str]:
    if len(stopped) > 1:
        return [f"processes stopped after different steps: {sorted(stopped)}"]
    [step] = stopped
    faults = [] if step >= before else [f"stopped after step {step}, before step {before}"]
    if how := damage(output / checkpoint_name(step)):
        faults.append(f"the checkpoint of step {step} is damaged: {how}")
    if not (output / checkpoint_name(step)).is_dir():
        faults.append(f"no checkpoint of step {step}")
    return faults


def damage_newest(output: Path, rng: random.Random) -> tuple[Path, Path] | None:
    """Flips a bit of the newest checkpoint, if there is an older one that is intact. Returns both
    folders.
    """
    intact = [path for path in checkpoints(output) if not damage(path)]
    if len(intact) < 2:
        return None
    path = rng.choice(sorted(each for each in intact[-1].rglob("*") if each.is_file()))
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return intact[-1], intact[-2]
