"""Four loaders that give the same batches; bench/loader.py runs this file in each environment.

The environments of the other loaders don't have this project's packages, so imports of a loader are
in its class, and only torch and simplejpeg are needed by all.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Final, TextIO

import simplejpeg
import torch
from torch.utils.data import default_collate, get_worker_info

Batch = dict[str, Any]  # key: list of str; image: (B, H, W, 3) uint8
MEMBERS: Final = ("jpg", "parsing.png", "identity.npy", "txt", "json")
SHARD_BYTES: Final = 64_000_000  # the size at which streaming starts a new shard, and LitData too
SHUFFLED: Final = 1000  # samples in webdataset's buffer
_MEMORY_POINTS: Final = 4  # of an epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """An epoch to read, from its beginning or from a saved state.

    data: a folder in the loader's format. batches: those that were read before the state was saved.
    saved_workers: worker processes at that time. state: what the loader itself saved.
    """

    data: str
    batch_size: int
    workers: int
    seed: int
    batches: int = 0
    saved_workers: int = 0
    state: Any = None


class Loader:
    """The rest of an epoch."""

    loader: Any  # the library's

    def __init__(self, task: Task) -> None:
        self.task = task

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)

    def state(self) -> Any:
        """Returns from what, besides the number of batches, another process continues: JSON."""
        return None


def sample_of(key: str, jpeg: bytes) -> dict[str, Any]:
    """Returns what a batch has of a sample: the same work in every loader."""
    return {"key": key, "image": torch.from_numpy(simplejpeg.decode_jpeg(jpeg, colorspace="RGB"))}


class Ours(Loader):
    """This project's loader: records by number, in the trainer's order."""

    def __init__(self, task: Task) -> None:
        from configs.training import DataSource
        from train.mixture import Mixture

        super().__init__(task)
        # the trainer too opens the index that its first start has made
        index = Path(task.data).with_name("index")
        self.mixture = Mixture([DataSource(path=task.data)], "all", index_folder=index)
        self.order = self.mixture.order(task.seed)

    def fetch(self, positions: range) -> Any:
        """Reads the samples of a micro-batch."""
        return self.mixture.records([self.order.sample(each) for each in positions])

    def make(self, positions: range, records: Any) -> Any:
        """Makes a micro-batch."""
        return default_collate([sample_of(record.key, record.image) for record in records])

    def __iter__(self) -> Iterator[Batch]:
        from train.loader import micro_batches

        size, first = self.task.batch_size, self.task.batches
        epoch = len(self.mixture) // size

        # the trainer's workers would go on with the next epoch; those of the others stop
        batches = micro_batches(
            lambda positions: self.fetch(positions) if positions.start < epoch * size else None,
            lambda positions, records: None if records is None else self.make(positions, records),
            start=first * size,
            size=size,
            workers=self.task.workers,
        )
        return islice(batches, epoch - first)


class Prepared(Ours):
    """This project's loader with all that the trainer prepares for Stable Diffusion 1.5."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        from model.conditions import DropRates
        from model.prompt import add_marks
        from model.spec import SPECS
        from model.vocabulary import clip_tokenizer
        from stages.backends.weights import Weights
        from train.batch_maker import BatchMaker
        from train.data import Preparation

        preparation = Preparation(
            tokenizer=add_marks(clip_tokenizer(Weights().fetch("clip_bpe"))),
            spec=SPECS["sd15"],
            mode="corrected",
            resolution=512,
            latent_channels=4,
            vae_factor=8,
            timesteps=1000,
            drop=DropRates(text=0.05, identity=0.05, both=0.05, legacy=False),
            seed=task.seed,
        )
        maker = BatchMaker(self.mixture, self.order, preparation)
        self.fetch, self.make = maker.fetch, maker.make


class WebDataset(Loader):
    """webdataset: shuffled shards, each worker its own, and a buffer of shuffled samples.

    It saves no state. The samples that were read before are read again, but not decoded.
    """

    def __init__(self, task: Task) -> None:
        import webdataset as wds

        tars = tars_of(Path(task.data))
        dataset = (
            wds.WebDataset(tars, shardshuffle=len(tars), detshuffle=True, seed=task.seed)
            .compose(wds.detshuffle(SHUFFLED, seed=task.seed))
            .compose(self._rest)
            .map(lambda sample: sample_of(sample["__key__"], sample["jpg"]))
            .batched(task.batch_size, collation_fn=default_collate, partial=False)
        )
        super().__init__(task)
        self.loader = wds.WebLoader(dataset, batch_size=None, num_workers=task.workers)

    def _rest(self, samples: Iterator[Any]) -> Iterator[Any]:
        """Leaves out the samples of this worker's batches among those read before."""
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        batches = len(range(number, self.task.batches, workers))
        return islice(samples, batches * self.task.batch_size, None)


class Saved(Loader):
    """A loader that saves its own state."""

    def _load(self, kind: Any, dataset: Any, task: Task) -> None:
        """Makes the library's loader, from the saved state if there is one."""
        self.loader = kind(
            dataset, batch_size=task.batch_size, num_workers=task.workers, drop_last=True
        )
        if task.state is not None:
            self.loader.load_state_dict(task.state)

    def state(self) -> Any:
        return self.loader.state_dict()


class Streaming(Saved):
    """mosaicml-streaming with the shuffle that orders all samples of an epoch at random."""

    def __init__(self, task: Task) -> None:
        from streaming import StreamingDataLoader, StreamingDataset

        class Pictures(StreamingDataset):
            def __getitem__(self, at: Any) -> Any:
                sample = super().__getitem__(at)
                return sample_of(sample["key"], sample["jpg"])

        dataset = Pictures(
            local=task.data,
            shuffle=True,
            shuffle_algo="naive",
            shuffle_seed=task.seed,
            num_canonical_nodes=1,
            batch_size=task.batch_size,
        )
        self._load(StreamingDataLoader, dataset, task)


class LitData(Saved):
    """LitData: shuffled chunks, and shuffled samples in each."""

    def __init__(self, task: Task) -> None:
        from litdata import StreamingDataLoader, StreamingDataset

        dataset = StreamingDataset(
            task.data,
            shuffle=True,
            seed=task.seed,
            drop_last=True,
            transform=lambda sample: sample_of(sample["key"], sample["jpg"]),
        )
        self._load(StreamingDataLoader, dataset, task)


LOADERS: Final[dict[str, type[Loader]]] = {
    "ours": Ours,
    "prepared": Prepared,
    "webdataset": WebDataset,
    "streaming": Streaming,
    "litdata": LitData,
}


@dataclass(slots=True)
class Reading:
    """What reading an epoch gave.

    first: seconds from the end of imports to the first batch. rate: samples/s after it. cpu:
    CPU-seconds of all processes, start-up included. keys: of each batch. state: after `save_at`
    batches. memory: MB of all processes (PSS) before, and the most during the epoch. shared: the
    most MB that were added to /dev/shm. error: why it ended early; "": it didn't.
    """

    first: float = 0.0
    rate: float = 0.0
    cpu: float = 0.0
    keys: list[list[str]] = field(default_factory=list)
    state: Any = None
    memory: tuple[float, float] = (0.0, 0.0)
    shared: float = 0.0
    error: str = ""


def serve(name: str, tasks: TextIO, replies: TextIO) -> None:
    """Reads an epoch for each line of `tasks`, in a new process that has all imports already.

    A line is the JSON of a list: Task, batches before the state is saved, file for the JSON of the
    Reading. An empty line is the reply when it is written.
    """
    _import(name)
    for line in tasks:
        task, save_at, result = json.loads(line)
        child = os.fork()
        if not child:
            reading = read_epoch(name, Task(**task), save_at)
            Path(result).write_text(json.dumps(asdict(reading)))
            for worker in multiprocessing.active_children():  # after an error
                worker.kill()
            return  # ends this process, with the loader's exit handlers
        os.waitpid(child, 0)
        print(file=replies, flush=True)


def read_epoch(name: str, task: Task, save_at: int = 0) -> Reading:
    """Reads the rest of an epoch. save_at: also save the state after as many batches, and measure
    memory, which makes the times useless. An exception is returned in `error`.
    """
    reading = Reading()
    try:
        _read_epoch(name, task, save_at, reading)
    except Exception as error:  # noqa: BLE001 - any library's
        *_, text = (str(error).strip() or "no message").splitlines()
        reading.error = f"{type(error).__name__}: {text}"
    return reading


def _read_epoch(name: str, task: Task, save_at: int, reading: Reading) -> None:
    before, shared = (memory_mb(), _shared_mb()) if save_at else (0.0, 0.0)
    most, cpu_before = before, cpu_seconds()
    now = started = time.perf_counter()
    batch: Any = None
    loader = LOADERS[name](task)
    points = {save_at * part // _MEMORY_POINTS for part in range(1, _MEMORY_POINTS + 1)}
    batches = iter(loader)
    for number, batch in enumerate(batches, 1):
        now = time.perf_counter()
        reading.first = reading.first or now - started
        reading.keys.append(list(batch["key"] if isinstance(batch, dict) else batch.keys))
        if number in points:
            most = max(most, memory_mb())
            reading.shared = max(reading.shared, _shared_mb() - shared)
        if number == save_at:
            reading.state = json.loads(json.dumps(loader.state()))
    if len(reading.keys) > 1:
        reading.rate = (len(reading.keys) - 1) * task.batch_size / (now - started - reading.first)
    reading.memory = (before, most)
    del batch, batches, loader  # ends the workers, so that their CPU time is counted
    reading.cpu = cpu_seconds() - cpu_before


def _import(name: str) -> None:
    """Imports what the loader needs, since imports aren't measured."""
    if name in ("ours", "prepared"):
        import webdataset  # noqa: F401

        import train.data  # noqa: F401
    elif name == "streaming":
        try:
            import torchvision  # noqa: F401
        except RuntimeError:
            # Its published builds don't load beside a CPU build of torch. streaming imports it, but
            # needs it for other data sets only.
            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float limit) -> Tensor")
        import streaming  # noqa: F401
    else:
        __import__(name)


def cpu_seconds() -> float:
    """Returns the CPU-seconds of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def memory_mb() -> float:
    """Returns the proportional memory (PSS) of the process that serves and its descendants, MB."""
    total, waiting = 0.0, [str(os.getppid())]
    while waiting:
        folder = Path("/proc") / waiting.pop()
        try:
            lines = (folder / "smaps_rollup").read_text().splitlines()
            for task in (folder / "task").iterdir():
                waiting += (task / "children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1000
    return total


def _shared_mb() -> float:
    return shutil.disk_usage("/dev/shm").used / 1e6


def tars_of(data: Path) -> list[str]:
    """Returns the tars of a data set's samples, in order."""
    return sorted(map(str, data.glob("shards/fgid-??????.tar")))


def samples_of(data: Path) -> Iterator[dict[str, Any]]:
    """Yields key and members of all samples of a data set, in order."""
    for path in tars_of(data):
        with tarfile.open(path) as tar:
            for key, members in groupby(tar, lambda member: member.name.partition(".")[0]):
                sample: dict[str, Any] = {"key": key}
                for member in members:
                    name = member.name.partition(".")[2]
                    sample[name] = tar.extractfile(member).read()
                yield sample


def convert(name: str, data: Path, output: Path) -> None:
    """Writes a data set in the format of `streaming` or `litdata`, with their own writers."""
    _import(name)
    if name == "streaming":
        from streaming import MDSWriter

        columns = {"key": "str", **dict.fromkeys(MEMBERS, "bytes")}
        with MDSWriter(out=str(output), columns=columns, size_limit=SHARD_BYTES) as writer:
            for sample in samples_of(data):
                writer.write(sample)
    else:
        from litdata import optimize

        optimize(samples_of, [data], str(output), num_workers=1, chunk_bytes=SHARD_BYTES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("loader", choices=LOADERS)
    parser.add_argument("--convert", nargs=2, type=Path, metavar=("DATA", "OUTPUT"))
    options = parser.parse_args()
    if options.convert:
        convert(options.loader, *options.convert)
        return
    torch.set_num_threads(1)
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # for what the libraries print
    serve(options.loader, sys.stdin, replies)


if __name__ == "__main__":
    main()
