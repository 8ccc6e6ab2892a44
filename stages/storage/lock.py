"""RunLock: one run at a time on an output, and a dead run's lock is no obstacle.

`run.lock` names the process that writes here, and is written anew every few seconds. On the same
host a lock is dead when its process is gone; from another host, when nobody has renewed it while we
watched. No clock is trusted.
"""

from __future__ import annotations

import json
import logging
import platform
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final
from uuid import uuid4

import psutil

from configs.errors import LockedError, StoreError
from stages.storage.store import Store

logger = logging.getLogger(__name__)

NAME: Final = "run.lock"
BEAT: Final = 10.0  # seconds between two renewals
_WATCH: Final = 3 * BEAT  # seconds to watch another host's lock


class RunLock:
    """A context. Raises LockedError on entering while another run is alive."""

    def __init__(self, store: Store, watch: float = _WATCH) -> None:
        self._store, self._watch = store, watch
        process = psutil.Process()
        self._mine = {
            "id": uuid4().hex,
            "host": _host(),
            "pid": process.pid,
            "process_started": process.create_time(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        self._beats = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="run lock")

    def __enter__(self) -> RunLock:
        found = self._read()
        if found and self._alive(found):
            raise LockedError(
                f"{self._store.url} is being written by process {found['pid']} on "
                f"{found['host']} since "
                f"{found['since']}. Wait until it ends or stop it; or give another output."
            )
        if found:
            logger.info(
                "the run of process %s on %s is dead; going on after it",
                found.get("pid"),
                found.get("host"),
            )
            self._store.remove(NAME)
        self._create()
        holder = self._read()
        if holder is None or holder["id"] != self._mine["id"]:
            raise LockedError(
                f"another run on {self._store.url} began at the same moment. Let it go on."
            )
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=BEAT)
        try:
            found = self._read()
            if found and found["id"] == self._mine["id"]:
                self._store.remove(NAME)
        # the run has its own end to tell of; a dead run's lock is no obstacle
        except StoreError as trouble:
            logger.warning("the lock of %s is left behind: %s", self._store.url, trouble)

    def _create(self) -> None:
        self._store.create(NAME, self._text())  # whoever came first is read back
        if not self._store.local:
            time.sleep(1.0)  # not every object store knows that it must not replace

    def _renew(self) -> None:
        while not self._stop.wait(BEAT):
            self._beats += 1
            try:
                self._store.write(NAME, self._text())
            except Exception as error:  # noqa: BLE001 - the work itself will meet the same trouble, and say it
                logger.warning("the lock of %s can't be renewed: %s", self._store.url, error)

    def _alive(self, found: dict[str, Any]) -> bool:
        if found["host"] == _host():
            if not psutil.pid_exists(found["pid"]):
                return False
            started = psutil.Process(found["pid"]).create_time()
            return bool(abs(started - found["process_started"]) < 1.0)
        logger.info(
            "%s has a lock from %s; watching for %.0f s whether it lives",
            NAME,
            found["host"],
            self._watch,
        )
        end = time.monotonic() + self._watch
        while time.monotonic() < end:
            time.sleep(min(1.0, self._watch / 4))
            now = self._read()
            if now is None:
                return False
            if now != found:
                return True
        return False

    def _read(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(self._store.read(NAME))
        except FileNotFoundError:
            return None
        except ValueError:
            # no run of ours wrote that
            return {"id": "", "host": _host(), "pid": -1, "process_started": 0.0}
        return found

    def _text(self) -> str:
        return json.dumps({**self._mine, "beats": self._beats}, indent=1) + "\n"


def _host() -> str:
    """The machine, and which start of it: after a reboot the same process number means nothing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:
        boot = str(int(psutil.boot_time()))
    return f"{platform.node()}/{boot}"
