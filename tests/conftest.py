"""Shared by the tests: pinned threads, models loaded once, eight real synthetic portraits, a data
set of them, and a folder of every kind of bad file.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from stages.backends.runtime import pin_threads
from stages.backends.weights import Weights
from tests import models
from tests.chaos.cluster import TOKEN
from tests.sharing import shared_folder

if TYPE_CHECKING:
    from train.mixture import Mixture
    from train.shards import ShardSet

pytest_plugins = ["tests.budget"]


def pytest_collection_finish() -> None:
    """Lets garbage collections skip the modules that collecting the tests has imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    pin_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _ray_token() -> Iterator[None]:
    """One token for all clusters of this process and its children: Ray reads it once."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TOKEN.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session", autouse=True)
def _models() -> Iterator[None]:
    """One copy of each model in this process; see tests/models.py."""
    with pytest.MonkeyPatch.context() as patch:
        models.remember(patch)
        yield


@pytest.fixture(scope="session")
def portraits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight MobileStyleGAN portraits, 1024 × 1024, seed 7.

    In a process of its own: on CPUs with AMX, OpenVINO sets an alternate signal stack, frees it
    with its models, and the next signal (a loader worker's SIGCHLD, say) then kills the process.
    """
    command = [sys.executable, "-m", "pipelines.cli", "synthesize", "--count", "8", "--seed", "7"]

    def make(folder: Path) -> None:
        subprocess.run([*command, str(folder)], check=True, capture_output=True)

    return shared_folder(tmp_path_factory, "portraits", make)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, portraits: Path) -> Path:
    """The output of a data set run on the portraits: eight samples in shards of 3, 3 and 2."""
    from configs.schema import DatasetConfig, SourceConfig
    from pipelines.run import run

    def make(folder: Path) -> None:
        run(
            DatasetConfig(
                source=SourceConfig(path=str(portraits)),
                output=str(folder),
                shard_size=3,
                executor="inline",
                threads=1,
            )
        )

    return shared_folder(tmp_path_factory, "dataset", make)


@pytest.fixture(scope="session")
def shards(data: Path) -> ShardSet:
    from train.shards import ShardSet

    return ShardSet(str(data))


@pytest.fixture(scope="session")
def mixture(data: Path) -> Mixture:
    from configs.training import DataSource
    from train.mixture import Mixture

    return Mixture([DataSource(path=str(data))])


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model in diffusers' layout, random weights from seed 0."""
    from model.tiny import make_tiny_base

    vocabulary = Weights().fetch("clip_bpe")
    return shared_folder(
        tmp_path_factory, "base", lambda folder: make_tiny_base(folder, vocabulary, 0)
    )


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A base of the spec `small`, see tests/bases.py."""
    from tests.bases import make_small_base

    return shared_folder(
        tmp_path_factory, "small", lambda folder: make_small_base(folder, tiny_base)
    )


@pytest.fixture(scope="session")
def poisoned(tmp_path_factory: pytest.TempPathFactory, portraits: Path) -> Path:
    """The demo's poisoned set, made from the portraits."""
    from pipelines.demo.poison import write_poisoned

    return shared_folder(
        tmp_path_factory,
        "poisoned",
        lambda folder: write_poisoned(folder, sorted(portraits.glob("*.jpg"))),
    )
