"""A Ray cluster of several nodes on this machine, every process of it a child of ours, to be killed
at will.
"""

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
# for its drivers too
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid4().hex + uuid4().hex}


@dataclass
class Node:
    """One `ray start --block`; with it die the raylet and all workers it has started."""

    process: subprocess.Popen[bytes]

    def workers(self) -> list[psutil.Process]:
        """Processes that run a task or an actor now."""
        found = []
        for child in tree(self.process.pid):
            title = title_of(child)
            if title.startswith("ray::") and not any(
                other in title for other in ("IDLE", "Agent", "SPILL", "RESTORE")
            ):
                found.append(child)
        return found

    def kill(self) -> None:
        for process in tree(self.process.pid):
            kill(process)
        self.process.kill()
        self.process.wait()


@dataclass
class Cluster:
    """A head, which lives, and nodes, which may not; `cpus`: what each says it has."""

    count: int
    cpus: int = 2
    nodes: list[Node] = field(default_factory=list)
    _given: int = 0  # loopback addresses: Ray would replace 127.0.0.1 by one that others can reach
    _net: str = field(
        default_factory=lambda: f"127.{random.randrange(1, 255)}.{random.randrange(255)}"
    )
    """Of its own: nodes of two clusters at one address would take each other's ports."""

    def __enter__(self) -> Cluster:
        self._folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets' paths have 107 bytes
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
        """Start a node. It has joined some seconds later."""
        self.nodes.append(self._start(["--address", self.address]))

    def lose(self, node: Node) -> None:
        """SIGKILL for everything on the node; a new one takes its place, as a cluster's autoscaler
        would have it.
        """
        node.kill()
        self.nodes.remove(node)
        self.add()

    def all(self) -> Iterator[Node]:
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
        self._given = self._given % 250 + 1
        log = (self._folder / f"node-{time.time_ns()}.log").open("wb")
        process = subprocess.Popen(
            [*command, f"{self._net}.{1 + self._given}", *arguments],
            cwd=ROOT,
            env={**os.environ, **_ENVIRONMENT, **TOKEN},
            stdout=log,
            stderr=log,
        )
        return Node(process)


def tree(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill(process: psutil.Process) -> bool:
    """SIGKILL; True if it was there to be killed."""
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(host: str, port: int, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex((host, port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError(f"nothing listens on {host}:{port}")
