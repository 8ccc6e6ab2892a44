"""A Ray cluster of several nodes on this machine, whose processes are children of this one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import psutil

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
ROOT = Path(__file__).parents[2]
_STORE = str(150 * 1024 * 1024)  # bytes of shared memory for each node
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "OMP_NUM_THREADS": "1",
}
# Environment of the nodes and of every driver.
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid4().hex + uuid4().hex}


@dataclass
class Node:
    """A node: the process `ray start --block`, with its raylet and workers as children."""

    process: subprocess.Popen[bytes]

    def workers(self) -> list[psutil.Process]:
        """Returns the processes that are running a task or an actor."""
        busy = []
        for child in descendants(self.process.pid):
            title = title_of(child)
            if title.startswith("ray::") and not any(
                other in title for other in ("IDLE", "Agent", "SPILL", "RESTORE")
            ):
                busy.append(child)
        return busy

    def kill(self) -> None:
        """Sends SIGKILL to the node and all its processes."""
        for process in descendants(self.process.pid):
            kill(process)
        self.process.kill()
        self.process.wait()


@dataclass
class Cluster:
    """A context manager that runs a cluster: a head, which isn't killed, and other nodes.

    count: nodes, including the head. cpus: number that each node declares. nodes: those other than
    the head.
    """

    count: int
    cpus: int = 2
    nodes: list[Node] = field(default_factory=list)
    # Nodes get loopback addresses other than 127.0.0.1, which Ray would replace by an external one.
    _last_address: int = 0
    # Each cluster has its own network, so that nodes of two clusters don't use the same ports.
    _net: str = field(
        default_factory=lambda: f"127.{random.randrange(1, 255)}.{random.randrange(255)}"
    )

    def __enter__(self) -> Cluster:
        self._folder = Path(tempfile.mkdtemp(prefix="ray-"))  # a socket path has at most 107 bytes
        self._port = free_port()
        ports = ["--ray-client-server-port", str(free_port()), "--dashboard-agent-listen-port", "0"]
        head = [
            "--head",
            "--port",
            str(self._port),
            "--include-dashboard=false",
            "--temp-dir",
            str(self._folder),
            *ports,
        ]
        self.head = self._start(head)
        try:
            wait_for_port(self._net + ".2", self._port)
            for _ in range(self.count - 1):
                self.add()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in [*self.nodes, self.head]:
            node.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def address(self) -> str:
        return f"{self._net}.2:{self._port}"

    def add(self) -> None:
        """Starts a node. It joins the cluster some seconds later."""
        self.nodes.append(self._start(["--address", self.address]))

    def replace(self, node: Node) -> None:
        """Kills a node and starts a new one, as a cluster's autoscaler would."""
        node.kill()
        self.nodes.remove(node)
        self.add()

    def all(self) -> Iterator[Node]:
        """Yields the head, then the other nodes."""
        yield self.head
        yield from self.nodes

    def _start(self, arguments: list[str]) -> Node:
        command = [
            *RAY,
            "start",
            "--block",
            "--num-cpus",
            str(self.cpus),
            "--object-store-memory",
            _STORE,
            "--node-ip-address",
        ]
        self._last_address = self._last_address % 250 + 1
        log = (self._folder / f"node-{time.time_ns()}.log").open("wb")
        process = subprocess.Popen(
            [*command, f"{self._net}.{1 + self._last_address}", *arguments],
            cwd=ROOT,
            env={**os.environ, **_ENVIRONMENT, **TOKEN},
            stdout=log,
            stderr=log,
        )
        return Node(process)


def descendants(pid: int) -> list[psutil.Process]:
    """Returns all processes below a process; none if it has ended."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def title_of(process: psutil.Process) -> str:
    """Returns a process's command line; "" if it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill(process: psutil.Process) -> bool:
    """Sends SIGKILL to a process; returns False if it has ended."""
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return False
    return True


def free_port() -> int:
    """Returns a TCP port that is free on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(host: str, port: int, seconds: float = 60) -> None:
    """Waits until something listens on a port; raises TimeoutError after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex((host, port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError(f"nothing listens on {host}:{port}")
