"""A server program in a Ray actor: what to start, the actor with its process, and its state."""

from __future__ import annotations

import http.client
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from configs.errors import ConfigError
from stages.executors.owned import OwnedProcess

GRACE: Final = 10.0  # seconds that a process has to end itself
ANSWER: Final = 5.0  # seconds for the answer to one check
_TAIL: Final = 2000  # characters of a log's end


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """What to start: `count` copies of a program, which answers GET /health when it is ready.

    program: a path, or a name that is looked up beside the node's Python, then on its PATH.
    arguments: of the program; {host} and {port} are replaced.
    gpus, cpus: of each copy.
    host: where all copies listen; "": each at the address of its node.
    port: of the first copy, the next ones follow; 0: any free ones.
    install: what to do if a node doesn't have the program.
    room_limit: seconds until the cluster must have room; one that isn't local may grow.
    start_limit: seconds until a server must be ready.
    silent_limit: seconds after which a ready server that doesn't answer is started again.
    logs: a folder for the logs, on each node.
    """

    program: str
    arguments: Sequence[str]
    count: int
    gpus: int
    cpus: float
    host: str = ""
    port: int = 0
    install: str = ""
    room_limit: float = 1800.0
    start_limit: float = 1800.0
    silent_limit: float = 120.0
    logs: str = field(default_factory=lambda: tempfile.mkdtemp(prefix="caption-servers-"))

    @property
    def needs(self) -> dict[str, float]:
        """What Ray reserves for each copy."""
        return {"CPU": self.cpus} | ({"GPU": float(self.gpus)} if self.gpus else {})


class Report(NamedTuple):
    """The state of a server.

    exit: its exit status, negative for a signal; None while it runs. tail: the end of its log, at
    most since it was started.
    """

    url: str
    pid: int
    node: str
    log: str
    exit: int | None
    answers: bool
    tail: str


class ServerActor:
    """Holds the process of server `index` of a spec."""

    def __init__(self, spec: ServerSpec, index: int) -> None:
        self._spec, self._host = spec, spec.host or _node_address()
        self._log = Path(spec.logs) / f"server-{index + 1}.log"
        self._port = self._log_start = 0
        self._process: OwnedProcess | None = None

    def start(self, port: int) -> Report:
        """Starts the server, at a free port if `port` is 0. Raises ConfigError if its program is
        missing.
        """
        program = self._find_program()
        self._port = port or _free_port(self._host)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        address = {"{host}": self._host, "{port}": str(self._port)}
        arguments = [address.get(text, text) for text in self._spec.arguments]
        with self._log.open("ab") as output:
            self._log_start = output.tell()
            self._process = OwnedProcess([program, *arguments], output=output)
        return self.check()

    def check(self) -> Report:
        assert self._process is not None
        status = self._process.poll()
        answers = status is None and _answers(self._host, self._port)
        return Report(
            url=f"http://{self._host}:{self._port}/v1",
            pid=self._process.pid,
            node=platform.node(),
            log=str(self._log),
            exit=status,
            answers=answers,
            tail="" if answers else _tail(self._log, self._log_start),
        )

    def stop(self) -> None:
        if self._process is not None:
            self._process.end(GRACE)

    def _find_program(self) -> str:
        name = self._spec.program
        beside = Path(sys.executable).parent / name  # the name itself if it is an absolute path
        program = str(beside) if beside.is_file() else shutil.which(name)
        if program is None:
            raise ConfigError(
                f"{name} is missing on node {platform.node()}: it is neither in {beside.parent} "
                f"nor on the PATH. {self._spec.install}"
            )
        return program


def _node_address() -> str:
    """Returns this node's address in the cluster."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return next(str(node["NodeManagerAddress"]) for node in ray.nodes() if node["NodeID"] == here)


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


def _answers(host: str, port: int) -> bool:
    """Returns whether GET /health succeeds; proxies aren't used."""
    connection = http.client.HTTPConnection(host, port, timeout=ANSWER)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _tail(path: Path, start: int) -> str:
    """Returns the last lines of a log from byte `start` on, without what only a terminal
    understands.
    """
    with path.open("rb") as stream:
        stream.seek(max(start, stream.seek(0, os.SEEK_END) - _TAIL))
        text = stream.read().decode(errors="replace")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n")
    lines = ("".join(filter(str.isprintable, line)).rstrip() for line in text.split("\n"))
    return "\n".join(line for line in lines if line)
