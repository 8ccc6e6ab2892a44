"""Signals: the first one stops after the step, a later one at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from types import FrameType

import pytest

from tests.train.helpers import run, small
from train.stopping import stop_on_signal


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def receive_signals(pause: float) -> None:
    with stop_on_signal() as stop:
        send(signal.SIGTERM)
        time.sleep(pause)
        send(signal.SIGINT)
        raise SystemExit(stop.signal)


@pytest.mark.parametrize(("pause", "status"), [(0.1, signal.SIGTERM), (2.1, 128 + signal.SIGINT)])
def test_a_signal_that_arrives_twice_is_one_and_a_later_one_stops_at_once(
    pause: float, status: int
) -> None:
    process = get_context("fork").Process(target=receive_signals, args=(pause,))
    process.start()
    process.join()
    assert process.exitcode == status


@pytest.fixture
def received() -> Iterator[list[int]]:
    """Signals that reach the handler from before the run."""
    numbers: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        numbers.append(number)

    previous = signal.signal(signal.SIGTERM, on_signal)
    yield numbers
    signal.signal(signal.SIGTERM, previous)


def test_a_signal_does_not_interrupt_the_writing_of_the_adapter(
    data: Path, tiny_base: Path, tmp_path: Path, received: list[int]
) -> None:
    output, sent = tmp_path / "out", threading.Event()

    def signal_when_it_is_written() -> None:
        while not list(output.glob(".final.*.partial")):
            time.sleep(0.001)
        send(signal.SIGTERM)
        sent.set()

    thread = threading.Thread(target=signal_when_it_is_written, daemon=True)
    thread.start()
    outcome = run(small(data, tiny_base, output, max_train_steps=1))
    thread.join(timeout=10)
    assert sent.is_set() and not received
    assert outcome.signal == 0 and outcome.adapter is not None
