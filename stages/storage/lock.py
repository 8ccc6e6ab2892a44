"""RunLock: allows one run at a time on an output. The lock of a dead run is replaced.

`run.lock` names the process that writes to the output; the process rewrites it every few seconds. A
lock from the same host is stale if its process no longer exists. A lock from another host is stale
if it isn't rewritten while this process watches it, so that clocks need not agree.
"""

from __future__ import annotations

import json
import logging
import platform
import threading
import time
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import psutil

from configs.errors import LockedError, StoreError
from stages.storage import layout
from stages.storage.store import Store

logger = logging.getLogger(__name__)

INTERVAL: Final = 10.0  # seconds between two renewals
_WATCH: Final = 3 * INTERVAL  # seconds to watch another host's lock
# seconds until a lock that another run creates at the same time can be seen
_SETTLE: Final = 1.0


class RunLock:
    """A context that holds the lock of an output. Entering it raises LockedError while another run
    writes to the output. watch: seconds to watch another host's lock.
    """

    def __init__(self, store: Store, watch: float = _WATCH) -> None:
        self._store, self._watch = store, watch
        process = psutil.Process()
        self._holder = {
            "id": uuid4().hex,
            "host": _host(),
            "pid": process.pid,
            "process_started": process.create_time(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        self._renewals = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="run lock")

    def __enter__(self) -> RunLock:
        other = self._read()
        if other and self._is_alive(other):
            raise LockedError(
                f"{self._store.url} is being written by process {other['pid']} on "
                f"{other['host']} since {other['since']}. Wait until it ends, stop it, or give "
                "another output."
            )
        if other:
            logger.info(
                "the run of process %s on %s is dead; its lock is replaced",
                other.get("pid"),
                other.get("host"),
            )
            self._store.remove(layout.LOCK)
        self._create()
        holder = self._read()
        if holder is None or holder["id"] != self._holder["id"]:
            raise LockedError(
                f"{self._store.url} is being written by another run, which started at the same "
                "time. Wait until it ends, or give another output."
            )
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(timeout=INTERVAL)
        try:
            holder = self._read()
            if holder and holder["id"] == self._holder["id"]:
                self._store.remove(layout.LOCK)
        # Not raised: it would hide how the run ended, and later runs replace the lock.
        except StoreError as failure:
            logger.warning("the lock of %s could not be removed: %s", self._store.url, failure)

    def _create(self) -> None:
        # if two runs try at once, reading the lock again shows which one has it
        self._store.create(layout.LOCK, self._text())
        if not self._store.local:
            time.sleep(_SETTLE)  # some object stores have no conditional writes

    def _renew(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._renewals += 1
            try:
                self._store.write(layout.LOCK, self._text())
            except Exception as error:  # noqa: BLE001 - the run fails by itself if the store does
                logger.warning("the lock of %s can't be renewed: %s", self._store.url, error)

    def _is_alive(self, holder: dict[str, Any]) -> bool:
        """Returns whether the run that holds the lock is alive; takes `watch` seconds for another
        host's.
        """
        if holder["host"] == _host():
            if not psutil.pid_exists(holder["pid"]):
                return False
            started = psutil.Process(holder["pid"]).create_time()
            return bool(abs(started - holder["process_started"]) < 1.0)
        logger.info(
            "%s is held by a run on %s; watching it for %.0f s",
            layout.LOCK,
            holder["host"],
            self._watch,
        )
        end = time.monotonic() + self._watch
        while time.monotonic() < end:
            time.sleep(min(1.0, self._watch / 4))
            now = self._read()
            if now is None:
                return False
            if now != holder:
                return True
        return False

    def _read(self) -> dict[str, Any] | None:
        """Returns the lock's contents; None if there is no lock."""
        try:
            holder: dict[str, Any] = json.loads(self._store.read(layout.LOCK))
        except FileNotFoundError:
            return None
        except ValueError:
            # not written by this program: treated as the lock of a dead process
            return {"id": "", "host": _host(), "pid": -1, "process_started": 0.0}
        return holder

    def _text(self) -> str:
        return json.dumps({**self._holder, "beats": self._renewals}, indent=1) + "\n"


def _host() -> str:
    """Returns the machine's name and its boot id: after a reboot, process ids are reused."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:
        boot = str(int(psutil.boot_time()))
    return f"{platform.node()}/{boot}"
