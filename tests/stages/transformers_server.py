"""`transformers serve` in a process of its own, on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class TransformersServer:
    """A server with one checkpoint, which may still be starting."""

    def __init__(self, checkpoint: Path, log: Path) -> None:
        self._url, self._log = f"http://127.0.0.1:{free_port()}", log
        program = Path(sys.executable).with_name("transformers")
        port = self._url.rpartition(":")[2]
        options = ["--host", "127.0.0.1", "--port", port, "--device", "cpu", "--dtype", "float32"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with log.open("wb") as stream:
            command = [str(program), "serve", str(checkpoint), *options]
            self.process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)

    def base_url(self) -> str:
        """Waits until the server is ready, and returns its base URL."""
        deadline = time.monotonic() + 400  # imports take seconds, on a busy machine minutes
        while not _is_ready(f"{self._url}/health"):
            running = self.process.poll() is None
            assert running and time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.1)
        return f"{self._url}/v1"

    def answers(self) -> int:
        """Returns the number of completions that the server has sent."""
        return self._log.read_text().count('POST /v1/chat/completions HTTP/1.1" 200')


@contextmanager
def transformers_server(checkpoint: Path, log: Path) -> Iterator[TransformersServer]:
    """Starts a server, which writes to the file `log`, and doesn't wait until it is ready."""
    server = TransformersServer(checkpoint, log)
    try:
        yield server
    finally:
        server.process.terminate()
        server.process.wait(timeout=30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
