"""Shared by the tests: pinned threads, eight real synthetic portraits, and a folder of every kind
of bad file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from stages.backends.runtime import pin_threads
from stages.backends.weights import Weights


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    pin_threads(1)


@pytest.fixture(scope="session")
def portraits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight MobileStyleGAN portraits, 1024 × 1024, seed 7.

    In a process of its own: on CPUs with AMX, OpenVINO sets an alternate signal stack, frees it
    with its models, and the next signal (a loader worker's SIGCHLD, say) then kills the process.
    """
    folder = tmp_path_factory.mktemp("portraits")
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "synthesize",
        "--count",
        "8",
        "--seed",
        "7",
        str(folder),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model in diffusers' layout, random weights from seed 0."""
    from model.tiny import make_tiny_base

    folder = tmp_path_factory.mktemp("tiny") / "base"
    make_tiny_base(folder, Weights().fetch("clip_bpe"), 0)
    return folder


@pytest.fixture(scope="session")
def poisoned(tmp_path_factory: pytest.TempPathFactory, portraits: Path) -> Iterator[Path]:
    """The demo's poisoned set, made from the portraits."""
    from pipelines.demo.poison import write_poisoned

    folder = tmp_path_factory.mktemp("poisoned")
    write_poisoned(folder, sorted(portraits.glob("*.jpg")))
    yield folder
