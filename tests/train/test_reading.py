"""Reading samples: requests ahead of their turn, faults of a store, what a killed run leaves."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from dataclasses import replace
from itertools import count, islice
from multiprocessing.util import get_temp_dir
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ShardError, StoreError
from configs.training import DataSource
from tests.stages.storage.s3_server import Bucket, Faults
from tests.train.helpers import Parts, assert_same_rows, sources
from train.batch_maker import BatchMaker
from train.cache import SampleCache
from train.data import unpacked
from train.loader import fetched_ahead, micro_batches
from train.mixture import Mixture
from train.packing import PackedBatch
from train.shards import ShardSet

FORK = multiprocessing.get_context("fork")


def maker_of(mixture: Mixture, parts: Parts) -> BatchMaker:
    """Returns a maker that keeps no sample in memory."""
    return BatchMaker(mixture, parts.maker._order, replace(parts.preparation, cache_size=0))


def batches_of(maker: BatchMaker, number: int, **options: int) -> list[PackedBatch]:
    return [*islice(micro_batches(maker.fetch, maker.make, start=4, size=2, **options), number)]


@pytest.fixture
def remote(bucket: Bucket, data: Path) -> Bucket:
    """The data set in a bucket."""
    for path in data.rglob("*"):
        if path.is_file() and "report" not in path.parts:
            bucket.put(f"out/{path.relative_to(data)}", path.read_bytes())
    return bucket


@settings(max_examples=8, deadline=None)
@given(
    size=st.integers(1, 3),
    world=st.integers(1, 2),
    workers=st.integers(0, 2),
    ahead=st.integers(0, 4),
    stops=st.lists(st.integers(0, 5), min_size=1, max_size=3),
)
def test_samples_requested_ahead_are_neither_lost_nor_doubled_after_a_stop(
    size: int, world: int, workers: int, ahead: int, stops: list[int]
) -> None:
    def fetch(positions: range) -> list[int]:
        time.sleep(0.001 * (positions.start % 3))  # so that later ones may be ready earlier
        return [*positions]

    position, read = 7, list[int]()
    for steps in stops:  # the consumer stops after `steps` steps and resumes at its position
        ranks = [
            micro_batches(
                fetch,
                start=position,
                size=size,
                rank=rank,
                world=world,
                workers=workers,
                ahead=ahead,
            )
            for rank in range(world)
        ]
        for _ in range(steps):
            for rank in ranks:
                read += next(rank)
        position += steps * size * world
    assert read == [*range(7, position)]


@pytest.mark.parametrize("ahead", [1, 3])
def test_further_batches_are_requested_while_one_is_made(ahead: int) -> None:
    requested, release = list[int](), threading.Event()

    def fetch(positions: range) -> int:
        requested.append(positions.start)
        if positions.start:
            assert release.wait(20)
        return positions.start

    source = (range(start, start + 1) for start in count())
    reading = fetched_ahead(fetch, source, ahead)
    assert next(reading)[1] == 0
    while len(requested) < ahead + 1:
        time.sleep(0.001)  # a deadlock, and the test's timeout, if they wait for each other
    time.sleep(0.02)
    assert sorted(requested) == [*range(ahead + 1)]
    release.set()
    assert [value for _, value in islice(reading, 5)] == [1, 2, 3, 4, 5]
    reading.close()  # type: ignore[attr-defined]


def test_closing_does_not_wait_for_a_slow_store() -> None:
    def fetch(positions: range) -> range:
        time.sleep(60 if positions.start else 0)
        return positions

    reading = micro_batches(fetch, start=0, size=1, workers=1, ahead=1)
    assert list(next(reading)) == [0]
    (worker,) = multiprocessing.active_children()
    began = time.monotonic()
    reading.close()
    assert not worker.is_alive() and time.monotonic() - began < 30


@pytest.mark.parametrize(("workers", "ahead"), [(0, 0), (0, 3), (1, 3)])
def test_an_error_of_a_request_is_raised_in_its_turn(workers: int, ahead: int) -> None:
    def fetch(positions: range) -> int:
        if positions.start == 3:
            raise StoreError("out of order")
        return positions.start

    reading = micro_batches(fetch, start=0, size=1, workers=workers, ahead=ahead)
    assert [next(reading) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(StoreError, match="out of order"):
        next(reading)


@pytest.mark.usefixtures("short_pauses")
def test_a_store_with_faults_gives_the_batches_of_local_files(
    remote: Bucket, parts: Parts, data: Path, tmp_path: Path
) -> None:
    local = batches_of(maker_of(Mixture(sources(data)), parts), 6)
    cache = SampleCache(tmp_path, 1_000_000_000)
    remote.proxy.reset(Faults(0.3, seed=5))
    mixture = Mixture([DataSource(path=remote.out)], cache=cache)
    faults = batches_of(maker_of(mixture, parts), 6, workers=2, ahead=2)
    # which faults there are depends on the order in which the workers send their requests
    assert len({request.fault for request in remote.proxy.requests} - {""}) > 2
    remote.proxy.reset()
    cached = batches_of(maker_of(mixture, parts), 6, ahead=2)
    assert remote.proxy.requests == []
    for batches in (faults, cached):
        for one, other in zip(local, batches, strict=True):
            assert_same_rows(*(unpacked(each, parts.preparation, "cpu") for each in (one, other)))


@pytest.mark.thorough
@pytest.mark.usefixtures("short_pauses")
def test_a_store_that_fails_is_an_error_of_the_run_and_not_a_bad_sample(
    remote: Bucket, parts: Parts
) -> None:
    maker = maker_of(Mixture([DataSource(path=remote.out)]), parts)
    remote.proxy.reset(Faults(always=lambda method, target: "503" if ".tar" in target else ""))
    with pytest.raises(StoreError, match="a request to s3://"):
        batches_of(maker, 1, ahead=2)
    remote.proxy.reset(Faults(always=lambda method, target: ""))
    assert batches_of(maker, 4, ahead=2)[3].valid.all()
    for name in range(3):
        remote._client.delete_object(Bucket=remote.name, Key=f"out/shards/fgid-00000{name}.tar")
    with pytest.raises(ShardError, match="a tar is missing"):
        batches_of(maker, 1, ahead=2)


def test_neighbours_in_a_tar_are_one_request(remote: Bucket, shards: ShardSet) -> None:
    data = ShardSet(remote.out)
    remote.proxy.reset()
    records = data.records([4, 2, 0, 1, 3])
    assert remote.downloads() == {"fgid-000000.tar": 1, "fgid-000001.tar": 1}
    expected = shards.records([4, 2, 0, 1, 3])
    assert [record.image for record in records] == [record.image for record in expected]


def test_a_thousand_batches_leave_no_file_open_and_no_memory(shards: ShardSet) -> None:
    def fetch(positions: range) -> torch.Tensor:
        [record] = shards.records([positions.start % 8])
        return torch.frombuffer(bytearray(record.image[:20_000]), dtype=torch.uint8)

    others = psutil.Process().children()
    reading = micro_batches(fetch, start=0, size=1, workers=1, ahead=2)
    sizes = []
    for number, _ in enumerate(islice(reading, 1200)):
        if number in (200, 1199):
            [worker] = set(psutil.Process().children()) - set(others)
            processes = (worker, psutil.Process())
            sizes.append([(each.num_fds(), each.memory_info().rss) for each in processes])
    for (files, memory), (files_after, memory_after) in zip(*sizes, strict=True):
        assert files_after <= files + 2
        assert memory_after < memory + 4_000_000


@pytest.mark.parametrize("pause", [0.0, 60.0])
def test_a_training_process_that_is_killed_leaves_no_worker_and_no_file(
    tmp_path: Path, pause: float
) -> None:
    """pause: seconds of each request."""
    folder = Path(tempfile.mkdtemp(prefix="k", dir="/tmp"))  # sockets have short names
    inherited = Path(get_temp_dir())  # of this process, and of those that it forks

    def fetch(positions: range) -> torch.Tensor:
        (tmp_path / f"requested-{os.getpid()}").touch()
        time.sleep(pause)
        return torch.zeros(100_000)

    def train() -> None:
        tempfile.tempdir = str(folder)
        for _ in micro_batches(fetch, start=0, size=1, workers=2, ahead=1):
            (tmp_path / "step").touch()

    main = FORK.Process(target=train)
    main.start()
    while len([*tmp_path.glob("requested-*" if pause else "step")]) < (2 if pause else 1):
        time.sleep(0.01)
    workers = psutil.Process(main.pid).children()
    os.kill(main.pid or 0, signal.SIGKILL)
    main.join()
    gone, alive = psutil.wait_procs(workers, timeout=20)
    assert len(gone) == 2 and not alive
    # torch names shared memory after the process that made it
    prefixes = [f"torch_{pid}_" for pid in (main.pid, *(worker.pid for worker in workers))]
    shared = [path.name for path in Path("/dev/shm").iterdir()]
    assert not [name for name in shared if name.startswith(tuple(prefixes))]
    assert [*folder.iterdir()] == [] and inherited.is_dir()
    shutil.rmtree(folder)
