"""Caption servers: vLLM or `transformers serve` on a Ray cluster, for `caption.backend=openai`."""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final, Literal, cast

from configs.errors import ConfigError
from configs.schema import RayConfig
from stages.executors.cluster import cluster_address, existing_address, ray_cluster
from stages.executors.fleet import ServerFleet
from stages.executors.owned import OwnedProcess
from stages.executors.server_actor import GRACE, ServerSpec

Engine = Literal["vllm", "transformers"]
_TICK: Final = 0.1  # seconds
_LOCAL_ROOM: Final = 5.0  # seconds in which a local cluster has room for the servers or never will
_INSTALL: Final = {
    "vllm": "Install vLLM on every node with a GPU, best in an environment of its own (python -m "
    "venv VENV && VENV/bin/pip install vllm), and give its path there: --program VENV/bin/vllm. "
    "--engine transformers needs no installation, but answers one request at a time.",
    "transformers": "Install this project there, with the extra `dev`.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RaySettings:
    """The settings of a run that the servers need too: where the cluster is."""

    ray: RayConfig = field(default_factory=RayConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionServers:
    """Settings of `python -m pipelines.cli caption-servers`.

    gpus: of all servers together, the same number for each. servers: 0: one for each GPU, or one.
    program: of the engine, a path or a name; "": the engine's name. port: of the first server; 0:
    free ones. server_args: more arguments of the program, as in a shell. logs: a folder; "": a
    temporary one. start_limit: seconds until a server must be ready. Raises ConfigError for an
    empty model, and for numbers that don't fit together.
    """

    model: str
    gpus: int = 0
    servers: int = 0
    cpus_each: float = 1.0
    engine: Engine = "vllm"
    program: str = ""
    port: int = 0
    server_args: str = ""
    logs: str = ""
    start_limit: float = 1800.0
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError(
                "--model (MODEL= of make) is empty: expected a hub id, such as "
                "llava-hf/llava-1.5-7b-hf, or a folder."
            )
        if self.gpus % self.count:
            raise ConfigError(
                f"--gpus {self.gpus} --servers {self.servers}: expected a number of GPUs that the "
                "servers can share equally."
            )

    @property
    def count(self) -> int:
        return self.servers or self.gpus or 1

    @property
    def gpus_each(self) -> int:
        return self.gpus // self.count

    @property
    def served_model(self) -> str:
        """The model's name in requests. A folder gets its full path: nodes have another working
        directory.
        """
        return str(Path(self.model).resolve()) if Path(self.model).is_dir() else self.model

    def spec(self) -> ServerSpec:
        """Returns what to start. In a local cluster the servers listen on loopback."""
        local = not existing_address(self.ray)
        program = self.program or self.engine
        arguments = ["serve", self.served_model, "--host", "{host}", "--port", "{port}"]
        arguments += self._vllm() if self.engine == "vllm" else self._transformers()
        folder = {"logs": str(Path(self.logs).resolve())} if self.logs else {}
        return ServerSpec(
            program=str(Path(program).absolute()) if "/" in program else program,
            arguments=[*arguments, *shlex.split(self.server_args)],
            count=self.count,
            gpus=self.gpus_each,
            cpus=self.cpus_each,
            host="127.0.0.1" if local else "",
            port=self.port,
            install=_INSTALL[self.engine],
            room_limit=_LOCAL_ROOM if local else self.start_limit,
            start_limit=self.start_limit,
            **cast(Any, folder),
        )

    def _vllm(self) -> list[str]:
        # The checkpoint's sampling settings, such as a repetition penalty, aren't applied. A
        # request has the image and perhaps a view of the face; room for videos would take memory.
        arguments = ["--generation-config", "vllm", "--disable-uvicorn-access-log"]
        arguments += ["--limit-mm-per-prompt", '{"image": 2, "video": 0}']
        parallel = ["--tensor-parallel-size", str(self.gpus_each)]
        return [*arguments, *(parallel if self.gpus_each > 1 else [])]

    def _transformers(self) -> list[str]:
        return ["--device", "auto" if self.gpus else "cpu"]


def run_caption_servers(
    settings: CaptionServers, command: Sequence[str], announce: Callable[[str], object]
) -> int:
    """Runs the servers until SIGINT or SIGTERM, or until `command` ends. Returns the exit status.

    command: starts when all servers are ready. In its arguments {base_url} and {model} are
    replaced; RAY_ADDRESS in its environment is the servers' cluster. It gets the signals that this
    process gets. announce: is called when all servers are ready, with the settings of a run that
    uses them.
    """
    spec = settings.spec()
    with ray_cluster(settings.ray), _Signals() as signals, ServerFleet(spec) as fleet:
        if not _wait_until_ready(fleet, signals):
            return 128 + signals.number
        values = {"{base_url}": ",".join(fleet.base_urls), "{model}": settings.served_model}
        address = existing_address(settings.ray) or cluster_address()
        run_settings = {
            "caption.backend": "openai",
            "caption.openai.model": values["{model}"],
            "caption.openai.base_url": values["{base_url}"],
            "ray.address": address,
        }
        announce(shlex.join(f"{name}={value}" for name, value in run_settings.items()))
        if not command:
            while not signals.number:
                fleet.tick()
                time.sleep(_TICK)
            return 0
        process = OwnedProcess(
            [_replace(argument, values) for argument in command],
            env={**os.environ, "RAY_ADDRESS": address},
        )
        try:
            signals.forward_to(process)
            while (status := process.poll()) is None:
                fleet.tick()
                time.sleep(_TICK)
        finally:
            process.end(GRACE)
        return status if status >= 0 else 128 - status


def _wait_until_ready(fleet: ServerFleet, signals: _Signals) -> bool:
    """Returns whether all servers became ready before a signal came."""
    while not fleet.ready and not signals.number:
        fleet.tick()
        time.sleep(_TICK)
    return not signals.number


def _replace(text: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(name, value)
    return text


class _Signals:
    """A context manager. SIGINT and SIGTERM don't end this process: they are noted, and forwarded.

    number: of the last signal; 0: none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._process: OwnedProcess | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def forward_to(self, process: OwnedProcess) -> None:
        """Forwards signals to the process, also one that came before."""
        self._process = process
        if self.number:
            process.send_signal(self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if self._process is not None:
            self._process.send_signal(number)
