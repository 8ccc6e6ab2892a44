"""The training command on one or several processes, and what is left when it has ended."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import psutil

from tests.chaos.cluster import ROOT, descendants, title_of
from train.history import HISTORY, read_lines

_MARK = "CHAOS_TRAINING"  # an environment variable that all processes of a round inherit
_SHARED = Path("/dev/shm")
_PATIENCE = 15.0  # seconds until processes without a parent must have ended; workers look every 5 s


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What may change between two starts. processes: those that train. workers: of each. micro:
    samples that a process takes at a time.
    """

    processes: int
    workers: int
    micro: int


@dataclass(frozen=True, slots=True)
class Command:
    """The command that trains in `output`. mark: identifies its processes. folder: for temporary
    files and the log. pids: of its processes, also of those that have ended.
    """

    preset: Path
    output: Path
    folder: Path
    mark: str
    pids: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, preset: Path, output: Path, folder: Path) -> Command:
        (folder / "tmp").mkdir(parents=True)
        return cls(preset, output, folder, uuid4().hex)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def start(self, layout: Layout, preexec: Callable[[], None] | None = None) -> Training:
        """Starts it: one process by itself, several with torch's launcher. preexec: runs in the
        process first.
        """
        count = str(layout.processes)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
        arguments = [
            *(launcher if layout.processes > 1 else []),
            *("-m", "train.cli", "run", "--config", str(self.preset), f"output={self.output}"),
            f"num_workers={layout.workers}",
            f"micro_batch_size={layout.micro}",
        ]
        environment = {
            **os.environ,
            _MARK: self.mark,
            "TMPDIR": str(self.folder / "tmp"),
            "OMP_NUM_THREADS": "1",
        }
        begin = self.log.stat().st_size if self.log.is_file() else 0
        with self.log.open("ab") as stream:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=environment,
                stdout=stream,
                stderr=stream,
                preexec_fn=preexec,
            )
        self.pids.add(process.pid)
        return Training(process, layout, self.log, begin, self.pids)

    def last_step(self) -> int:
        """Returns the last step in losses.jsonl, 0 if there is none."""
        return max((line["step"] for line in read_lines(self.output / HISTORY)), default=0)

    def processes(self) -> list[psutil.Process]:
        """Returns the processes that were started by this command and are alive."""
        return [process for process in psutil.process_iter() if _mark_of(process) == self.mark]

    def remains(self) -> list[str]:
        """Returns faults: processes that outlive the command."""
        end = time.monotonic() + _PATIENCE
        while (alive := self.processes()) and time.monotonic() < end:
            time.sleep(0.5)
        return [f"process {process.pid} is left: {title_of(process)[-90:]}" for process in alive]


@dataclass(frozen=True, slots=True)
class Training:
    """A start of the command. begin: where its output begins in the log. pids: of all processes
    that were seen of the round.
    """

    process: subprocess.Popen[bytes]
    layout: Layout
    log: Path
    begin: int
    pids: set[int]

    def text(self) -> str:
        """Returns what this start has printed."""
        with self.log.open("rb") as stream:
            stream.seek(self.begin)
            return stream.read().decode(errors="replace")

    def is_running(self) -> bool:
        return self.process.poll() is None

    def ranks(self) -> list[psutil.Process]:
        """Returns the processes that train, in the order in which they were started."""
        if self.layout.processes == 1:
            return [psutil.Process(self.process.pid)]
        children = psutil.Process(self.process.pid).children()
        return sorted((p for p in children if "train.cli" in title_of(p)), key=lambda p: p.pid)

    def everything(self) -> list[psutil.Process]:
        """Returns the command's process and all below it, which are the last ones."""
        return [psutil.Process(self.process.pid), *descendants(self.process.pid)]

    def wait(self, until: Callable[[], bool], limit: float) -> bool:
        """Waits until a condition holds, the start has ended, or `limit` seconds have passed.
        Returns whether it has not ended.
        """
        end = time.monotonic() + limit
        while self.is_running() and not until() and time.monotonic() < end:
            self.pids.update(process.pid for process in descendants(self.process.pid))
            time.sleep(0.1)
        return self.is_running()


def _mark_of(process: psutil.Process) -> str:
    try:
        return str(process.environ().get(_MARK, ""))
    except (psutil.Error, OSError):
        return ""


def shared_files() -> set[str]:
    """Returns the names of the files in shared memory."""
    return {path.name for path in _SHARED.iterdir()} if _SHARED.is_dir() else set()


def unused(names: set[str], pids: set[int]) -> set[str]:
    """Returns those files in shared memory that no process uses, except for those that torch has
    created in processes other than `pids`.
    """
    names = {name for name in names & shared_files() if _creator(name) in (None, *pids)}
    in_use = "\n".join(_used_files()) if names else ""
    return {name for name in names if f"/{name}" not in in_use}


def _creator(name: str) -> int | None:
    """Returns the process that has created a file, if torch's name of it says so."""
    match = re.match(r"torch_(\d+)_", name)
    return int(match[1]) if match else None


def _used_files() -> Iterator[str]:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            yield (process / "maps").read_text()
            yield from (str(link.readlink()) for link in (process / "fd").iterdir())
        except OSError:
            continue
