"""The cache of samples on disk: its bound, damage, several processes, and disks that fail."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import logging
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from stages.storage.reader import SamplePlace
from train.cache import SampleCache

SIZE = 1000  # bytes of a sample
SHARE = 3 * SIZE + 500  # bytes of a subfolder: room for three samples


class Origin:
    """Samples whose digests all begin with the same two digits, so that they share a subfolder."""

    def __init__(self, count: int) -> None:
        contents = (b"%d".ljust(SIZE, b".") % i for i in itertools.count())
        digests = ((data[:SIZE], hashlib.sha256(data[:SIZE]).hexdigest()) for data in contents)
        chosen = [*itertools.islice((each for each in digests if each[1][:2] == "7f"), count)]
        self.data = {digest: data for data, digest in chosen}
        self.places = [
            SamplePlace(f"k{i}", "a.tar", i, SIZE, each[1]) for i, each in enumerate(chosen)
        ]
        self.fetched: list[int] = []

    def fetch(self, places: Sequence[SamplePlace]) -> list[bytes]:
        self.fetched += [place.offset for place in places]
        return [self.data[place.sha256] for place in places]

    def read(self, cache: SampleCache, *numbers: int) -> list[int]:
        """Reads samples, and returns the numbers of those that were fetched."""
        self.fetched.clear()
        places = [self.places[number] for number in numbers]
        assert cache.read(places, self.fetch) == [self.data[place.sha256] for place in places]
        return [*self.fetched]


@pytest.fixture(scope="module")
def origin() -> Origin:
    return Origin(12)


def new_cache(folder: Path) -> SampleCache:
    return SampleCache(folder, 256 * SHARE)


def samples_in(folder: Path) -> list[Path]:
    return [path for path in folder.glob("7f/*") if not path.name.startswith(".")]


def test_a_sample_is_fetched_once_by_all_processes_and_the_order_is_kept(
    origin: Origin, tmp_path: Path
) -> None:
    cache = new_cache(tmp_path)
    assert origin.read(cache, 2, 0) == [2, 0]
    assert origin.read(cache, 0, 1, 2) == [1]
    assert origin.read(new_cache(tmp_path), 1, 1, 2) == []


def test_samples_that_were_read_longest_ago_make_room(origin: Origin, tmp_path: Path) -> None:
    cache = new_cache(tmp_path)
    for number in (0, 1, 2):
        origin.read(cache, number)
        time.sleep(0.01)
    origin.read(cache, 0)
    origin.read(cache, 3)  # instead of 1
    assert len(samples_in(tmp_path)) == 3
    assert origin.read(cache, 0, 2, 3) == []
    assert origin.read(cache, 1) == [1]


def test_a_sample_without_a_digest_or_larger_than_the_room_is_fetched_each_time(
    origin: Origin, tmp_path: Path
) -> None:
    unknown = [SamplePlace("k", "a.tar", 0, SIZE)]
    cache = new_cache(tmp_path)
    for _ in range(2):
        assert cache.read(unknown, lambda places: [b"x"] * len(places)) == [b"x"]
    small = SampleCache(tmp_path, 256 * (SIZE - 1))
    assert origin.read(small, 0) == origin.read(small, 0) == [0]
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("content", [b"", b"half of it", b"," * SIZE])
def test_a_damaged_file_is_fetched_again(origin: Origin, tmp_path: Path, content: bytes) -> None:
    cache = new_cache(tmp_path)
    origin.read(cache, 0)
    [path] = samples_in(tmp_path)
    path.write_bytes(content)
    assert origin.read(cache, 0) == [0]
    assert origin.read(cache, 0) == []


def test_damaged_bytes_are_returned_but_not_stored(origin: Origin, tmp_path: Path) -> None:
    cache = new_cache(tmp_path)
    assert cache.read(origin.places[:1], lambda _: [b"damaged"]) == [b"damaged"]
    assert samples_in(tmp_path) == []


def test_a_subfolder_changes_only_under_its_lock(origin: Origin, tmp_path: Path) -> None:
    cache = new_cache(tmp_path)
    origin.read(cache, 0)
    reader = threading.Thread(target=origin.read, args=(cache, 1))
    with (tmp_path / "7f/.bytes").open("rb") as counter:
        fcntl.flock(counter, fcntl.LOCK_EX)
        reader.start()
        time.sleep(0.2)
        assert len(samples_in(tmp_path)) == 1 and reader.is_alive()
    reader.join()
    assert len(samples_in(tmp_path)) == 2


def read_for_ever(folder: Path, seed: int) -> None:
    origin, cache, rng = Origin(12), new_cache(folder), random.Random(seed)
    while True:
        origin.read(cache, *rng.sample(range(12), 3))


def test_processes_that_are_killed_while_they_write_leave_the_bound_and_the_bytes_intact(
    origin: Origin, tmp_path: Path
) -> None:
    fork = multiprocessing.get_context("fork")
    rng = random.Random(0)

    def start() -> multiprocessing.process.BaseProcess:
        process = fork.Process(target=read_for_ever, args=(tmp_path, rng.randrange(1000)))
        process.start()
        return process

    running = [start() for _ in range(3)]
    most, end = 0, time.monotonic() + 2
    while time.monotonic() < end:
        time.sleep(rng.random() * 0.05)
        victim = running.pop(0)
        os.kill(victim.pid or 0, signal.SIGKILL)
        victim.join()
        running.append(start())
        most = max(most, size_of(tmp_path))
    for process in running:
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    assert 2 * SIZE < most <= SHARE
    # a file that a killed process was writing goes when room is needed
    (tmp_path / "7f" / f".7f{'0' * 62}").write_bytes(b"begun")
    cache = new_cache(tmp_path)
    for number in range(12):
        origin.read(cache, number)
    names = [path.name for path in (tmp_path / "7f").iterdir()]
    assert [name for name in names if name.startswith(".")] == [".bytes"]
    assert size_of(tmp_path) <= SHARE


def size_of(folder: Path) -> int:
    """Bytes of the samples in the folder, also of those that are being written."""
    total = 0
    for path in folder.glob("7f/*"):
        if path.name != ".bytes":
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
    return total


def in_another_process(function: Callable[[], None]) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("is_full", [False, True])
def test_a_disk_that_takes_no_samples_is_one_message_for_all_processes(
    origin: Origin, tmp_path: Path, caplog: pytest.LogCaptureFixture, is_full: bool
) -> None:
    folder = tmp_path / "cache"
    if not is_full:
        folder.write_text("a file in the folder's place")
    cache = new_cache(folder)
    handler = logging.FileHandler(tmp_path / "log")
    logging.getLogger("train.cache").addHandler(handler)

    def work() -> None:
        if is_full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        assert origin.read(cache, 0, 1) == [0, 1]
        assert origin.read(cache, 1, 2) == [1, 2]

    assert [in_another_process(work) for _ in range(2)] == [0, 0]
    logging.getLogger("train.cache").removeHandler(handler)
    [line] = (tmp_path / "log").read_text().splitlines()
    assert line.startswith(f"{folder} can't be written (") and "set cache_folder" in line
    if is_full:
        assert samples_in(folder) == [] and not [*folder.glob("7f/.7f*")]
