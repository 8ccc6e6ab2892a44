"""The lock of an output: two runs at once, a killed run, and a lock of another host."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from configs.errors import LockedError
from stages.storage.layout import LOCK
from stages.storage.lock import RunLock
from stages.storage.store import Store
from tests.stages.storage.helpers import HOLDER


def test_the_error_of_a_second_run_names_the_first_and_the_end_of_a_run_removes_the_lock(
    tmp_path: Path,
) -> None:
    store = Store(str(tmp_path))
    with RunLock(store):
        message = r"being written by process \d+ on .* since 20.*give another output"
        with pytest.raises(LockedError, match=message), RunLock(store):
            pass
        assert store.exists(LOCK)
    assert not store.exists(LOCK)


def test_the_lock_of_a_killed_run_is_replaced_at_once(tmp_path: Path) -> None:
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
        assert json.loads((tmp_path / LOCK).read_text())["pid"] != holder.pid


def test_the_lock_is_stale_if_its_process_id_was_reused(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with RunLock(store):
        text = json.loads(store.read(LOCK))
    store.write(LOCK, json.dumps({**text, "process_started": text["process_started"] - 1000}))
    with RunLock(store):
        pass


def test_a_lock_of_another_host_is_replaced_only_if_it_is_not_renewed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with RunLock(store):
        text = json.loads(store.read(LOCK))
    other = {**text, "host": "elsewhere/1", "id": "x"}
    store.write(LOCK, json.dumps(other))
    with RunLock(store, watch=1.0):  # it isn't renewed
        pass
    store.write(LOCK, json.dumps(other))
    renewal = threading.Timer(0.5, lambda: store.write(LOCK, json.dumps({**other, "beats": 7})))
    renewal.start()
    with pytest.raises(LockedError, match="elsewhere"), RunLock(store, watch=5.0):
        pass
    renewal.join()


def test_a_malformed_lock_is_replaced(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text('{"id": "')
    with RunLock(Store(str(tmp_path))):
        pass
    assert [path.name for path in tmp_path.iterdir()] == []
