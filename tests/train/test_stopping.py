"""Signals, sent to this process."""

from __future__ import annotations

import signal
import time

import pytest

from train.stopping import stop_on_signal


def test_a_signal_that_a_launcher_passes_on_is_not_a_second_one() -> None:
    with pytest.raises(KeyboardInterrupt), stop_on_signal() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # torchrun's, after the scheduler's
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGTERM
        time.sleep(1.1)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second signal should have ended the process at once")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
