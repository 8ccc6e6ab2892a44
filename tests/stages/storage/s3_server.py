"""An S3 server (moto's) on loopback in a separate process, and a proxy that injects faults.

`python -m tests.stages.storage.s3_server` prints the server's port and serves until it is killed.
"""

from __future__ import annotations

import hashlib
import http.client
import random
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from stages.storage.layout import DUPLICATES, IDENTITIES
from stages.storage.manifest import Manifest

# of a client
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "somebody",
    "AWS_SECRET_ACCESS_KEY": "not-to-be-seen-anywhere",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",  # Store retries, botocore doesn't
}
KINDS = ("500", "503", "slow", "cut", "lost")
ERROR = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>out of order</Message></Error>"
SHARDS = "out/shards/"
CODES = {
    "500": b"InternalError",
    "503": b"ServiceUnavailable",
    "403": b"AccessDenied",
    "404": b"NoSuchUpload",
}


@dataclass(frozen=True, slots=True)
class Request:
    """A request that the proxy got. status: of the response. fault: injected one; "": none."""

    method: str
    path: str
    query: str
    status: int
    fault: str


@dataclass
class Faults:
    """The faults to inject: into a random share of all requests, but never into three in a row with
    one method and target; or those that `always` returns for a method and a target.

    500, 503, 403, 404: an error response; the request isn't passed on. slow: a late response. cut:
    half a response. lost: the request is passed on, and the connection closed without a response.
    """

    share: float = 0.0
    seed: int = 0
    always: Callable[[str, str], str] = lambda method, target: ""
    _in_a_row: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random, self._lock = random.Random(self.seed), threading.Lock()

    def draw(self, method: str, target: str) -> str:
        """Returns the fault for a request to `target` (path and query); "": none."""
        with self._lock:
            if fault := self.always(method, target):
                return fault
            request = method, target
            if self._random.random() >= self.share or self._in_a_row[request] == 2:
                self._in_a_row[request] = 0
                return ""
            self._in_a_row[request] += 1
            return self._random.choice(KINDS)


class Proxy(ThreadingHTTPServer):
    """Passes requests on to the server at port `upstream`, injects `faults`, and records all
    requests.
    """

    daemon_threads = True
    request_queue_size = 64  # a connection that finds no place is tried again after a second

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.faults = upstream, Faults()
        self.requests: list[Request] = []
        # called after each request that changed something
        self.changed: Callable[[], None] = lambda: None
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def reset(self, faults: Faults | None = None) -> None:
        """Sets the faults (None: no faults), and deletes the recorded requests."""
        self.faults, self.changed = faults or Faults(), lambda: None
        self.requests.clear()

    def changes(self, folder: str) -> list[tuple[str, str]]:
        """Returns (method, path below `folder`) of each request that changed something there, in
        order.
        """
        changes = [
            r
            for r in self.requests
            if r.method in ("PUT", "DELETE", "POST") and 200 <= r.status < 300
        ]
        return [
            (r.method, r.path.removeprefix(folder)) for r in changes if r.path.startswith(folder)
        ]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints nothing if a client has closed its connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the acknowledgement of its headers
    server: Proxy

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.faults.draw(self.command, f"{path}?{parts.query}")
        if fault in CODES:
            self._record(path, parts.query, int(fault), fault)
            self._send(int(fault), {"Content-Type": "application/xml"}, ERROR % CODES[fault], -1)
            return
        if fault == "slow":
            time.sleep(0.1)
        with self.server.lock if self.command in ("PUT", "DELETE", "POST") else threading.Lock():
            status, headers, data = self._forward(body)
            self._record(path, parts.query, status, fault)
            if self.command in ("PUT", "DELETE", "POST"):
                self.server.changed()
        cut = {"cut": len(data) // 2, "lost": 0}.get(fault, -1)
        self._send(status, headers, data, cut, silent=fault == "lost")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815 - http.server's names

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        try:
            headers = {
                name: value for name, value in self.headers.items() if name.lower() != "expect"
            }
            upstream.request(self.command, self.path, body or None, headers)
            response = upstream.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            upstream.close()

    def _record(self, path: str, query: str, status: int, fault: str) -> None:
        self.server.requests.append(Request(self.command, path, query, status, fault))

    def _send(
        self, status: int, headers: dict[str, str], body: bytes, cut: int, silent: bool = False
    ) -> None:
        """Sends a response. cut: bytes of the body to send before closing the connection; -1: all.
        silent: close the connection without a response.
        """
        if cut >= 0:
            self.close_connection = True
        if silent:
            return
        self.send_response(status)
        excluded = {"connection", "transfer-encoding", "server", "date"}
        if self.command != "HEAD":
            excluded.add("content-length")
        for name, value in headers.items():
            if name.lower() not in excluded:
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut < 0 else body[:cut])

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing."""


class Bucket:
    """A new bucket. The pipeline uses it through the proxy; these methods connect directly."""

    def __init__(self, client: Any, through: Proxy) -> None:
        self.name, self.proxy, self._client = f"b-{uuid.uuid4().hex[:12]}", through, client
        self._client.create_bucket(Bucket=self.name)

    @property
    def out(self) -> str:
        return f"s3://{self.name}/out"

    def upload(self, folder: Path, to: str = "in") -> str:
        """Uploads all files of a folder and returns its URL in the bucket."""
        for path in sorted(folder.iterdir()):
            self.put(f"{to}/{path.name}", path.read_bytes())
        return f"s3://{self.name}/{to}"

    def put(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=self.name, Key=key, Body=data)

    def copy_of(self, other: Bucket) -> None:
        for key in other.stamps():
            self.put(key, other.read(key))

    def read(self, key: str) -> bytes:
        data: bytes = self._client.get_object(Bucket=self.name, Key=key)["Body"].read()
        return data

    def stamps(self) -> dict[str, tuple[str, Any]]:
        """Returns key → (ETag, time of change) of every object."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.name)
        objects = [item for page in pages for item in page.get("Contents", ())]
        return {item["Key"]: (item["ETag"], item["LastModified"]) for item in objects}

    def digests(self) -> dict[str, str]:
        """Returns what helpers.digests returns, for out/."""
        tables = (f"out/{DUPLICATES}", f"out/{IDENTITIES}")
        keys = [
            key
            for key in self.stamps()
            if key in tables or (key.startswith(SHARDS) and key.endswith((".tar", ".parquet")))
        ]
        return {key.rsplit("/", 1)[-1]: hashlib.sha256(self.read(key)).hexdigest() for key in keys}

    def manifests(self) -> list[str]:
        return _manifests(self.stamps())

    def changes(self) -> list[tuple[str, str]]:
        return self.proxy.changes(f"/{self.name}/{SHARDS}")

    def downloads(self) -> Counter[str]:
        """Returns name → number of GET requests, for the files in out/shards/."""
        folder = f"/{self.name}/{SHARDS}"
        paths = [r.path for r in self.proxy.requests if r.method == "GET"]
        return Counter(path.removeprefix(folder) for path in paths if path.startswith(folder))

    def watch(self) -> list[str]:
        """Returns a list that gets, after each change of a file in out/shards/, the names of the
        manifests that are inconsistent.
        """
        names: list[str] = []
        seen = 0

        def check() -> None:
            nonlocal seen
            changes = len(self.changes())
            if changes > seen:
                seen = changes
                names.extend(self.inconsistent())

        self.proxy.changed = check
        return names

    def inconsistent(self) -> list[str]:
        """Returns the names of the manifests whose files are missing or have another sha256."""
        names = []
        stamps = self.stamps()
        for name in _manifests(stamps):
            for file in Manifest.from_json(self.read(f"{SHARDS}{name}"), name).files:
                key = f"{SHARDS}{file.name}"
                if key not in stamps or hashlib.sha256(self.read(key)).hexdigest() != file.sha256:
                    names.append(name)
        return names


def _manifests(keys: Iterable[str]) -> list[str]:
    return [key.removeprefix(SHARDS) for key in keys if key.startswith(SHARDS) and ".json" in key]


@contextmanager
def s3_server() -> Iterator[int]:
    """Starts an empty S3 server, whose listings have three keys a page. Yields its port."""
    command = [sys.executable, "-m", "tests.stages.storage.s3_server"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        yield int(server.stdout.readline())
    finally:
        server.kill()
        server.wait()


@contextmanager
def proxy(upstream: int) -> Iterator[Proxy]:
    """Starts a proxy of the server at port `upstream`."""
    with Proxy(upstream) as server:
        thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def _serve() -> None:
    import os

    os.environ["MOTO_S3_DEFAULT_MAX_KEYS"] = "3"  # so that listings have several pages
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    print(server.get_host_and_port()[1], flush=True)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    _serve()
