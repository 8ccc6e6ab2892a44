"""Two runs at once, a run that was killed, and a lock from another machine."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from configs.errors import LockedError
from stages.storage.lock import NAME, RunLock
from stages.storage.store import Store
from tests.stages.storage.helpers import HOLDER


def test_the_second_run_stops_with_who_holds_it_and_the_lock_goes_with_the_run(
    tmp_path: Path,
) -> None:
    store = Store(str(tmp_path))
    with RunLock(store):
        said = r"being written by process \d+ on .* since 20.*give another output"
        with pytest.raises(LockedError, match=said), RunLock(store):
            pass
        assert store.exists(NAME)
    assert not store.exists(NAME)


def test_a_killed_runs_lock_is_recognised_at_once(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(LockedError), RunLock(Store(str(tmp_path))):
        pass
    holder.kill()
    holder.wait()
    started = time.monotonic()
    with RunLock(Store(str(tmp_path))):
        assert time.monotonic() - started < 10
        assert json.loads((tmp_path / NAME).read_text())["pid"] != holder.pid


def test_a_process_number_that_was_given_away_again_holds_nothing(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with RunLock(store):
        text = json.loads(store.read(NAME))
    store.write(NAME, json.dumps({**text, "process_started": text["process_started"] - 1000}))
    with RunLock(store):
        pass


def test_another_hosts_lock_is_watched_not_dated(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with RunLock(store):
        text = json.loads(store.read(NAME))
    far = {**text, "host": "elsewhere/1", "id": "x"}
    store.write(NAME, json.dumps(far))
    with RunLock(store, watch=1.0):  # nobody renews it
        pass
    store.write(NAME, json.dumps(far))
    renewal = threading.Timer(0.5, lambda: store.write(NAME, json.dumps({**far, "beats": 7})))
    renewal.start()
    with pytest.raises(LockedError, match="elsewhere"), RunLock(store, watch=5.0):
        pass
    renewal.join()


def test_a_lock_that_no_run_wrote_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text('{"id": "')
    with RunLock(Store(str(tmp_path))):
        pass
    assert [path.name for path in tmp_path.iterdir()] == []
