"""A small HTTP server on loopback with OpenAI's chat completions and list of models, which records
all requests for completions.

By default the text of a response is the image's digest and the prompt. `decide` can return any
other reply.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from stages.codec import decode_jpeg

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


@dataclass(frozen=True, slots=True)
class Request:
    """A request that the server got. number: how many requests it got earlier."""

    number: int
    body: dict[str, Any]
    key: str

    @property
    def jpegs(self) -> list[bytes]:
        """The images, which come before the prompt."""
        urls = [part["image_url"]["url"] for part in self.body["messages"][0]["content"][:-1]]
        assert urls and all(url.startswith("data:image/jpeg;base64,") for url in urls)
        return [base64.b64decode(url.partition(",")[2]) for url in urls]

    @property
    def jpeg(self) -> bytes:
        return self.jpegs[0]

    @property
    def is_plain(self) -> bool:
        """Whether the picture has one colour, as pictures that test a server."""
        return int(np.ptp(decode_jpeg(self.jpeg))) == 0

    @property
    def prompt(self) -> str:
        text: str = self.body["messages"][0]["content"][-1]["text"]
        return text


@dataclass(frozen=True, slots=True)
class Reply:
    """A response. seconds: delay before it is sent."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def caption_of(jpeg: bytes, prompt: str) -> str:
    """Returns the text with which the server responds by default."""
    return f"{hashlib.sha256(jpeg).hexdigest()[:12]}: {prompt}"


def completion(
    request: Request,
    seconds: float = 0.0,
    text: str = "",
    finish: str | None = "stop",
    prompt_tokens: int = 7,
) -> Reply:
    """Returns a chat completion for the request. text: the answer; "": the usual one."""
    content = text or caption_of(request.jpeg, request.prompt)
    message = {"role": "assistant", "content": content}
    body = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": request.body["model"],
        "usage": USAGE | {"prompt_tokens": prompt_tokens},
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
    }
    return Reply(200, json.dumps(body).encode(), seconds=seconds)


def within(context: int) -> Callable[[Request], Reply]:
    """Returns a `decide` of a server with a context of so many tokens, of which a picture needs one
    for 28 × 28 pixels and each prompt 20.
    """

    def decide(request: Request) -> Reply:
        height, width = decode_jpeg(request.jpeg).shape[:2]
        limits = ("max_tokens", "max_completion_tokens")
        answer = next(request.body[name] for name in limits if name in request.body)
        prompt = width * height // 784 + 20
        if prompt + answer <= context:
            return completion(request, prompt_tokens=prompt)
        return refusal(
            400,
            f"'max_tokens' or 'max_completion_tokens' is too large: {answer}. This model's maximum "
            f"context length is {context} tokens and your request has {prompt} input tokens",
        )

    return decide


def refusal(status: int, message: str, **headers: str) -> Reply:
    """Returns an error response with OpenAI's JSON."""
    return Reply(status, json.dumps({"error": {"message": message}}).encode(), headers)


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # a connection that finds no place is tried again after a second

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints no traceback for a client that was killed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


# as servers list a model of which they state nothing
MODELS = ({"id": "someone/model"}, {"id": "m"})


class ChatServer:
    """A context in which the server listens. requests: all requests; most_open: the highest number
    of requests that were open at the same time. models: entries of /v1/models; none: it
    has no list. port: 0: any.
    """

    def __init__(
        self,
        decide: Callable[[Request], Reply] = completion,
        models: Sequence[dict[str, Any]] = MODELS,
        port: int = 0,
    ) -> None:
        self.models = models
        self._port = port
        self.requests: list[Request] = []
        self.most_open = 0
        self._decide, self._open, self._lock = decide, 0, threading.Lock()
        self._connections: list[socket.socket] = []

    def __enter__(self) -> ChatServer:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # else a body waits 40 ms for the acknowledgement of its headers
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                server._connections.append(self.connection)

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                if len(data) == int(self.headers["Content-Length"]):  # else the server is closing
                    body = json.loads(data)
                    self._send(server._reply(self.path, body, self.headers["Authorization"]))

            def do_GET(self) -> None:
                body = json.dumps({"object": "list", "data": [*server.models]}).encode()
                is_list = self.path == "/v1/models" and server.models
                self._send(Reply(200, body) if is_list else refusal(404, f"no {self.path} here"))

            def _send(self, reply: Reply) -> None:
                self.send_response(reply.status)
                for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.body)))
                with suppress(BrokenPipeError, ConnectionResetError):  # after the client's timeout
                    self.end_headers()
                    self.wfile.write(reply.body)

            def log_message(self, *_: Any) -> None:
                """Logs nothing."""

        self._http = _Http(("127.0.0.1", self._port), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        for connection in self._connections:
            with suppress(OSError):  # it may be closed already
                connection.shutdown(socket.SHUT_RDWR)
        self._http.server_close()
        self._thread.join()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    def _reply(self, path: str, body: dict[str, Any], authorization: str) -> Reply:
        if path != "/v1/chat/completions":
            return refusal(404, f"no {path} here")
        with self._lock:
            request = Request(len(self.requests), body, authorization.removeprefix("Bearer "))
            self.requests.append(request)
            self._open += 1
            self.most_open = max(self.most_open, self._open)
        reply = self._decide(request)
        time.sleep(reply.seconds)
        with self._lock:
            self._open -= 1
        return reply
