"""Server programs as Ray actors: started, checked, started again, and stopped.

A placement group reserves what the servers need, and ties each to a node, so that a server that is
started again keeps its address. An actor holds the process of one server (`server_actor`).
`ServerFleet`, in the driver, asks the actors once a second and decides.

A server ends with its actor, and the actor with the driver, also if one of them is killed.
"""

from __future__ import annotations

import logging
import shlex
import time
from contextlib import suppress
from typing import Any, Final

from configs.errors import ConfigError, ServerError
from stages.executors.cluster import list_nodes
from stages.executors.server_actor import ANSWER, GRACE, Report, ServerActor, ServerSpec

logger = logging.getLogger(__name__)

_CHECK: Final = 1.0  # seconds between two checks of a server
_STABLE: Final = 300.0  # after so many seconds, earlier failures of a server don't count
_LONGEST_PAUSE: Final = 60.0  # seconds before a server is started again
_FIRST_FAILURES: Final = 3  # as many, in a server that has never been ready, are an error
_QUIET: Final = 30.0  # seconds after which an unchanged state is logged again
_CHANGED: Final = 5.0  # seconds after which a changed one is
_STOPPED: Final = 2.0  # seconds between two ticks after which this process must have been stopped


class _Server:
    """A server as the driver sees it: its actor, its state, and when to start it again."""

    def __init__(self, spec: ServerSpec, index: int, group: Any) -> None:
        self._spec, self._index, self._group = spec, index, group
        self._name = f"server {index + 1} of {spec.count}"
        self._actor: Any = None
        self._pending: Any = None  # the call that the actor processes
        self._running = False  # it was started, and hasn't failed since
        self._next = 0.0  # when to call the actor again
        self._started = self._answered = self._ready_since = 0.0
        self._ticked = time.monotonic()
        self._failures = 0  # in a row
        self._port = spec.port + index if spec.port else 0
        self._logged, self._shown = 0.0, ""  # the last progress line: when, and what
        self._report: Report | None = None
        self.ready = False
        self.url = ""

    def tick(self) -> None:
        """Takes the actor's answer, if there is one, and calls it again when it is time. Raises
        ServerError if the server can't be started, ConfigError if its program is missing.
        """
        import ray

        now = time.monotonic()
        if now - self._ticked > _STOPPED:
            self._answered += now - self._ticked  # this process was stopped, not the server silent
        self._ticked = now
        if self._pending is None:
            if now >= self._next:
                self._pending = self._actor.check.remote() if self._running else self._start(now)
            return
        if ray.wait([self._pending], timeout=0)[0]:
            try:
                report: Report = ray.get(self._pending)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayActorError:
                self._actor = None
                self._fail(now, "its actor died")
                return
            self._pending, self._next = None, now + _CHECK
            self._take(report, now)
        limit = self._spec.silent_limit if self.ready else self._spec.start_limit
        if self._running and now - self._answered > limit:
            self._fail(now, f"it has not answered for {limit:g} s")

    def stop(self) -> Any:
        """Stops the server. Returns a Ray reference that is ready when it has ended."""
        return None if self._actor is None else self._actor.stop.remote()

    def kill(self) -> None:
        import ray

        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None

    def _start(self, now: float) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        if self._actor is None:
            place = PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=self._index
            )
            actor = ray.remote(ServerActor).options(
                num_cpus=self._spec.cpus,
                num_gpus=self._spec.gpus,
                scheduling_strategy=place,
            )
            self._actor = actor.remote(self._spec, self._index)
        self._running, self.ready = True, False
        self._started = self._answered = self._logged = now
        self._report = None
        return self._actor.start.remote(self._port)

    def _take(self, report: Report, now: float) -> None:
        first, self._report = self._report is None, report
        if first:
            logger.info(
                "%s: process %d on %s, log %s", self._name, report.pid, report.node, report.log
            )
        if report.exit is not None:
            how = f"signal {-report.exit}" if report.exit < 0 else f"exit status {report.exit}"
            self._fail(now, f"it ended with {how}")
        elif report.answers:
            self._answered = now
            if not self.ready:
                self._become_ready(report, now)
        elif not self.ready:
            self._show(now, report.tail.rpartition("\n")[2])

    def _become_ready(self, report: Report, now: float) -> None:
        logger.info("%s: ready after %.0f s, %s", self._name, now - self._started, report.url)
        if self.url not in ("", report.url):
            logger.warning(
                "%s: its node is gone, so its address has changed: before, it was %s",
                self._name,
                self.url,
            )
        self.ready, self._ready_since, self.url = True, now, report.url
        self._port = int(report.url.rpartition(":")[2].partition("/")[0])

    def _show(self, now: float, line: str) -> None:
        """Logs that the server is starting, and the last line of its log."""
        if now - self._logged < (_QUIET if line == self._shown else _CHANGED):
            return
        self._logged, self._shown = now, line
        logger.info("%s: starting, %.0f s: %s", self._name, now - self._started, line[:150])

    def _fail(self, now: float, why: str) -> None:
        """Ends what is left of the server, and plans its next start. Raises ServerError if it has
        never been ready and there is no hope.
        """
        if self.ready and now - self._ready_since > _STABLE:
            self._failures = 0
        self._failures += 1
        slow = now - self._started > self._spec.start_limit
        if not self.url and (slow or self._failures >= _FIRST_FAILURES):
            times = "" if slow else f" {self._failures} times in a row"
            raise ServerError(f"{self._name} can't be started: {why}{times}.{self._end_of_log()}")
        pause = min(2.0 ** (self._failures - 1), _LONGEST_PAUSE)
        logger.warning("%s: %s; it is started again in %g s", self._name, why, pause)
        if self._pending is not None:
            self.kill()  # it doesn't answer either
        else:
            self.stop()
        self._pending, self._running, self.ready = None, False, False
        self._next = now + pause

    def _end_of_log(self) -> str:
        if self._report is None:
            return ""
        return f" The end of its log, {self._report.log}:\n{self._report.tail}"


class ServerFleet:
    """A context manager that starts servers, and stops them at the end. In between, `tick` must be
    called several times a second.
    """

    def __init__(self, spec: ServerSpec) -> None:
        self._spec = spec
        self._servers: list[_Server] = []
        self._placed = False
        self._began = time.monotonic()
        self._logged = self._began

    def __enter__(self) -> ServerFleet:
        import ray

        spec = self._spec
        logger.info(
            "%d × (%s), each %g CPU, %g GPU",
            spec.count,
            shlex.join([spec.program, *spec.arguments]),
            spec.cpus,
            spec.gpus,
        )
        self._group = ray.util.placement_group([spec.needs] * spec.count, strategy="PACK")
        self._servers = [_Server(spec, index, self._group) for index in range(spec.count)]
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        calls = [call for server in self._servers if (call := server.stop()) is not None]
        stopped = 0
        if calls:
            ray.wait(calls, num_returns=len(calls), timeout=GRACE + ANSWER + 1)
        for call in calls:
            with suppress(ray.exceptions.RayError):
                ray.get(call, timeout=0)
                stopped += 1
        if calls and not stopped:
            return  # the cluster is gone, and the servers with it
        for server in self._servers:
            server.kill()
        ray.util.remove_placement_group(self._group)

    @property
    def ready(self) -> bool:
        """Whether all servers have answered when they were asked last."""
        return all(server.ready for server in self._servers)

    @property
    def base_urls(self) -> list[str]:
        """Of all servers, when they have been ready; "" for others."""
        return [server.url for server in self._servers]

    def tick(self) -> None:
        """Takes the news of all servers, and starts again what has failed. Takes milliseconds.

        Raises ConfigError if the cluster can't hold the servers or the program is missing,
        ServerError if a server can't be started.
        """
        if not self._placed:
            self._place()
            return
        for server in self._servers:
            server.tick()

    def _place(self) -> None:
        """Looks whether the servers have their places."""
        import ray

        self._placed = ray.util.placement_group_table(self._group)["state"] == "CREATED"
        now, spec = time.monotonic(), self._spec
        if self._placed or now - self._logged < _CHANGED:
            return
        self._logged = now
        nodes = list_nodes()
        text = (
            f"{spec.count} servers, each with {spec.gpus} GPU and {spec.cpus:g} CPU, have no room "
            f"in the cluster. Free are {sum(node.gpus for node in nodes):g} GPU and "
            f"{sum(node.cpus for node in nodes):g} CPU; on one node, at most "
            f"{max(node.gpus for node in nodes):g} GPU and {max(node.cpus for node in nodes):g} CPU"
        )
        if now - self._began > spec.room_limit:
            raise ConfigError(f"{text}. Start fewer servers, or add nodes.")
        logger.info("%s. Waiting for nodes", text)
