"""Our loader compared with webdataset, mosaicml-streaming and LitData: `python -m bench.loader`.

All read the same samples in full shuffle, as each offers it, decode each picture with the same
function and give batches of the same size (bench/loaders.py). The loaders take turns, each epoch in
a new process, so that a drift of the machine's speed affects all: quote the ratios. streaming and
LitData run in environments of their own, on copies of the samples in their own formats.

Each loader also saves its state at 90 % of an epoch, and a new process continues from there, with
the same and with another number of worker processes. What it then reads is compared with what the
first process read after that point: samples that are missing are lost to that epoch, samples that
come a second time are doubled.
"""

from __future__ import annotations

import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Final

import typer

from bench.against import cores
from bench.environments import installed
from bench.loaders import Reading, Task
from configs.load import load
from configs.schema import DatasetConfig
from pipelines.chain import build_chain
from stages.record import key_of
from stages.storage.commit import ChainInfo, PlannedShard, commit
from stages.storage.manifest import ShardRun
from stages.storage.reader import DatasetReader
from stages.storage.store import Store

PORTRAITS: Final = 48  # different pictures; the others are copies with keys of their own
SHARD: Final = 512  # samples, about 64 MB
BATCH: Final = 32
RESUME_AT: Final = 0.9
SECONDS: Final = 600  # after which an epoch counts as failed
PEERS: Final = {"streaming": "mosaicml-streaming==0.13.0", "litdata": "litdata==0.2.76"}
ROOT: Final = Path(__file__).parents[1]


class Contender:
    """A loader, in a process that has its imports and forks for each epoch (bench.loaders.serve).

    python: of its environment. data: a folder in its format.
    """

    def __init__(self, name: str, python: Path, data: Path) -> None:
        self.name, self._data = name, data
        self._result = data.parent / f"{name}.json"
        with (data.parent / f"{name}.log").open("w") as log:
            self._process = subprocess.Popen(
                _command(python, name),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                env=_environment(),
                start_new_session=True,
            )

    def read(self, task: Task, save_at: int = 0) -> Reading:
        """Reads an epoch, or the rest of one, in a new process. See `bench.loaders.read_epoch`."""
        process = self._process
        if process.poll() is not None:
            return Reading(error="the process died")
        assert process.stdin is not None and process.stdout is not None
        self._result.unlink(missing_ok=True)
        values = [asdict(replace(task, data=str(self._data))), save_at, str(self._result)]
        process.stdin.write(json.dumps(values) + "\n")
        if not select.select([process.stdout], [], [], SECONDS)[0]:
            self.end()
            return Reading(error=f"nothing after {SECONDS} s")
        process.stdout.readline()
        if not self._result.exists():
            return Reading(error="the process died")
        return Reading(**json.loads(self._result.read_text()))

    def end(self) -> None:
        """Ends the process, and those that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@dataclass(frozen=True, slots=True)
class Trial:
    """What a loader did with one number of workers. whole: an undisturbed epoch. saved: its state
    at 90 %. epochs, resumed: of each turn, timed.
    """

    contender: Contender
    whole: Reading
    saved: Task
    epochs: list[Reading] = field(default_factory=list)
    resumed: list[Reading] = field(default_factory=list)

    @property
    def readings(self) -> list[Reading]:
        return [self.whole, *self.epochs, *self.resumed]


def main(
    count: Annotated[int, typer.Option(min=256, help="Samples, a multiple of 64.")] = 2048,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each loader.")] = 5,
    workers: Annotated[list[int] | None, typer.Option(help="Worker processes; may repeat.")] = None,
    loader: Annotated[
        list[str] | None, typer.Option(help="webdataset, streaming, litdata; may repeat.")
    ] = None,
    prepare: Annotated[
        bool, typer.Option(help="Also measure ours with all that the trainer prepares.")
    ] = False,
    folder: Annotated[Path, typer.Option(help="For data and environments, which stay.")] = Path(
        "runs/bench-loader"
    ),
) -> None:
    """Print samples/s, first batch, resume and memory of each loader, and what it loses."""
    if count % (2 * BATCH):
        raise typer.BadParameter(f"--count {count}: expected a multiple of {2 * BATCH}")
    folder = folder.resolve()
    data = write_data(folder, count)
    contenders = [Contender("ours", Path(sys.executable), data)]
    for name in loader or ["webdataset", *PEERS]:
        if peer := prepared_peer(name, data, folder):
            contenders.append(peer)
    if prepare:
        contenders.append(Contender("prepared", Path(sys.executable), data))
    numbers = workers or [0, 2]
    try:
        print(f"{count:,} samples, {data_mb(data):,.0f} MB, batches of {BATCH}; {_machine()}")
        for number in numbers:
            compare(contenders, number, numbers, count, rounds)
    finally:
        for contender in contenders:
            contender.end()


def write_data(folder: Path, count: int) -> Path:
    """Writes a data set of `count` samples, unless it exists: copies of synthetic portraits that
    the demo's pipeline processed. Returns its folder.
    """
    output, small = folder / f"data-{count}", folder / "portraits"
    if output.exists():
        return output
    run = [sys.executable, "-m", "pipelines.cli"]
    # in other processes, for the reason in tests/conftest.py
    photos = folder / "photos"
    subprocess.run([*run, "synthesize", str(photos), "--count", str(PORTRAITS)], check=True)
    overrides = [f"source.path={photos}", f"output={small}", "executor=inline"]
    command = [*run, "run", "--config", "configs/dataset/demo.yaml", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    reader = DatasetReader(str(small))
    originals = [record for index in reader.manifests() for record in reader.samples(index)]
    signatures = next(iter(reader.manifests().values())).signatures
    config = load(DatasetConfig, "configs/dataset/demo.yaml", overrides)
    chain = ChainInfo(signatures, ChainInfo.of(build_chain(config), signed=()).annotations)
    partial = folder / f"data-{count}.part"
    shutil.rmtree(partial, ignore_errors=True)
    for index, first in enumerate(range(0, count, SHARD)):
        names = [f"{number:08d}.jpg" for number in range(first, min(first + SHARD, count))]
        records = [
            replace(originals[(first + place) % len(originals)], key=key_of(name), source=name)
            for place, name in enumerate(names)
        ]
        shard = PlannedShard(index=index, inputs=len(records), bytes=0, digest="")
        commit(Store(str(partial)), shard, records, chain, ShardRun({}, "", time.time()).finish())
    return partial.replace(output)


def data_mb(data: Path) -> float:
    """Returns the size of a data set's tars, MB."""
    return sum(path.stat().st_size for path in data.glob("shards/*.tar")) / 1e6


def prepared_peer(name: str, data: Path, folder: Path) -> Contender | None:
    """Installs a loader and converts the data for it. None, with a message, if it can't be done."""
    if name not in PEERS:
        return Contender(name, Path(sys.executable), data)
    try:
        # this project's versions of what all loaders work with
        pins = [f"{each}=={version(each).partition('+')[0]}" for each in ("torch", "simplejpeg")]
        print(", ".join([PEERS[name], *pins]), flush=True)
        python = installed(folder / f"{name}-env", [PEERS[name], *pins])
        converted = folder / f"{name}-{data.name}"
        if not converted.exists():
            partial = folder / f"{name}-{data.name}.part"
            shutil.rmtree(partial, ignore_errors=True)
            command = _command(python, name, "--convert", str(data), str(partial))
            subprocess.run(command, check=True, capture_output=True, text=True, env=_environment())
            partial.replace(converted)
    except subprocess.CalledProcessError as error:
        lines = [line for line in (error.stderr or "").splitlines() if line.strip()]
        print(f"{name} is left out: {lines[-1] if lines else error}")
        return None
    return Contender(name, python, converted)


def compare(
    contenders: Sequence[Contender], workers: int, others: Sequence[int], count: int, rounds: int
) -> None:
    """Measures all loaders with one number of workers, and prints two tables."""
    at = int(count // BATCH * RESUME_AT)
    epoch = Task(data="", batch_size=BATCH, workers=workers, seed=0)
    trials = []
    for contender in contenders:
        whole = contender.read(epoch, save_at=at)
        saved = replace(epoch, batches=at, saved_workers=workers, state=whole.state)
        trials.append(Trial(contender, whole, saved))
    for _ in range(rounds):
        for trial in trials:
            trial.epochs.append(trial.contender.read(epoch))
            trial.resumed.append(trial.contender.read(trial.saved))
    print(f"\n{workers} worker processes, {rounds} turns")
    print_speeds(trials)
    print("resumed      workers   exact   lost   doubled")
    for trial in trials:
        name = trial.contender.name
        print(
            f"{name:12} {workers} → {workers}   {continued(trial.whole, at, trial.resumed[0])}",
            flush=True,
        )
        for other in others:
            if other != workers:
                rest = trial.contender.read(replace(trial.saved, workers=other))
                print(
                    f"{name:12} {workers} → {other}   {continued(trial.whole, at, rest)}",
                    flush=True,
                )


def continued(whole: Reading, at: int, rest: Reading) -> str:
    """Compares what is read after a resume with what the undisturbed epoch read after `at` batches:
    whether its batches are the same in the same order, and how many samples are lost and doubled.
    """
    if rest.error:
        return rest.error
    before, after = whole.keys[:at], whole.keys[at:]
    expected = Counter(key for batch in before + after for key in batch)
    counted = Counter(key for batch in before + rest.keys for key in batch)
    lost, doubled = (expected - counted).total(), (counted - expected).total()
    return f"{rest.keys == after!s:>7} {lost:6} {doubled:9}"


def print_speeds(trials: Sequence[Trial]) -> None:
    """Prints medians; of ratios also the least and the most. Above 1 is faster than ours."""
    print(
        f"{'loader':12} {'samples/s':>9} {'÷ ours':>19} {'CPU-ms':>7} {'÷ ours':>19} "
        f"{'first batch, s':>20} {'resumed, s':>20} {'MB':>6} {'imports':>8} {'/dev/shm':>9}"
    )
    for trial in trials:
        if error := next((each.error for each in trial.readings if each.error), ""):
            print(f"{trial.contender.name:12} {error}")
            continue
        pairs = list(zip(trial.epochs, trials[0].epochs, strict=True))
        print(
            f"{trial.contender.name:12} {median(each.rate for each in trial.epochs):9.0f} "
            f"{_spread([each.rate / ours.rate for each, ours in pairs]):>19} "
            f"{median(_cpu_ms(each) for each in trial.epochs):7.2f} "
            f"{_spread([_cpu_ms(each) / _cpu_ms(ours) for each, ours in pairs]):>19} "
            f"{_spread([each.first for each in trial.epochs]):>20} "
            f"{_spread([each.first for each in trial.resumed]):>20} "
            f"{trial.whole.memory[1]:6.0f} {trial.whole.memory[0]:8.0f} {trial.whole.shared:9.0f}",
            flush=True,
        )


def _cpu_ms(reading: Reading) -> float:
    """Returns CPU-milliseconds for each sample."""
    return reading.cpu / sum(map(len, reading.keys)) * 1000


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}, {max(values):.2f})"


def _command(python: Path, *options: str) -> list[str]:
    return [str(python), "-m", "bench.loaders", *options]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _machine() -> str:
    return f"{cores()} cores, {platform.machine()}, Python {platform.python_version()}"


if __name__ == "__main__":
    typer.run(main)
