"""One picture from one URL: from public addresses only, within limits of time and size, as its
server allows.

A host's address is looked up once, checked, and connected to as it is: no second look-up could
answer otherwise. TLS still checks the name. Each redirect goes the same way. Proxies of the
environment are not used.
"""

from __future__ import annotations

import io
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable
from contextvars import ContextVar
from http.client import HTTPResponse
from typing import Any, Final
from urllib.parse import urljoin

from urllib3 import (
    BaseHTTPResponse,
    HTTPConnectionPool,
    HTTPSConnectionPool,
    PoolManager,
    Retry,
    Timeout,
)
from urllib3 import exceptions as faults
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util import parse_url
from urllib3.util.connection import create_connection

from pipelines.sources.base import Transient
from stages.base import Dropped, Failed

USER_AGENT: Final = (
    "consistentid-pipeline/0.1 (collects pictures for a data set; heeds X-Robots-Tag)"
)
_HEADERS: Final = {
    "User-Agent": USER_AGENT,
    "Accept": "image/*,*/*;q=0.5",
    "Accept-Encoding": "identity",
}
_REDIRECTS: Final = 5
_PATIENCE: Final = 10  # the whole picture must be here within as many times `timeout`
_CHUNK: Final = 1 << 18  # bytes
_LATER: Final = frozenset({408, 425, 429})
_NO: Final = frozenset({"noai", "noimageai", "noindex", "noimageindex"})
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")

Allowed = Callable[[str], bool]  # an address, as text
# time.monotonic() at which this thread's fetch is given up
_deadline: ContextVar[float] = ContextVar("deadline")


class Refused(faults.HTTPError):
    """A host none of whose addresses may be connected to."""


class Fetcher:
    """Fetches pictures, from any number of threads.

    allowed: which addresses may be connected to. timeout: seconds for connecting and without a
    byte. limit: bytes of a picture, decoded. at_once: fetches at a time.
    """

    def __init__(
        self, allowed: Allowed, timeout: float, limit: int, ignore_robots: bool, at_once: int
    ) -> None:
        self._timeout, self._limit, self._ignore_robots = timeout, limit, ignore_robots
        self._pools = PoolManager(num_pools=2 * at_once, maxsize=at_once, headers=_HEADERS)
        self._pools.pool_classes_by_scheme = checked_pools(allowed)

    def fetch(self, url: str) -> bytes:
        """The body behind `url`.

        Raises Failed: bad_url, refused_address, bad_certificate, too_many_redirects,
        too_many_bytes, bad_encoding, http_<status>; Transient: connection, timeout, cut_off,
        http_<status>; Dropped: robots_opt_out.
        """
        _deadline.set(time.monotonic() + _PATIENCE * self._timeout)
        for _ in range(_REDIRECTS + 1):
            try:
                check_url(url)
                response = self._request(url)
            except faults.HTTPError as error:
                raise _verdict(error) from None
            try:
                target = response.get_redirect_location()
                if not target:
                    return self._taken(response)
                url = _joined(url, target)
            except faults.ProtocolError:
                raise Transient("cut_off", "the body ended early") from None
            except faults.HTTPError as error:
                raise _verdict(error) from None
            finally:
                response.close()
        raise Failed("too_many_redirects", f"more than {_REDIRECTS}")

    def _request(self, url: str) -> BaseHTTPResponse:
        return self._pools.request(
            "GET",
            url,
            redirect=False,
            retries=False,
            preload_content=False,
            timeout=Timeout(connect=self._timeout, read=self._timeout),
        )

    def _taken(self, response: BaseHTTPResponse) -> bytes:
        if response.status != 200:
            reason = f"http_{response.status}"
            if response.status in _LATER or response.status >= 500:
                raise Transient(reason, after=_retry_after(response.headers.get("Retry-After", "")))
            raise Failed(reason)
        if not self._ignore_robots and opts_out(response.headers.getlist("X-Robots-Tag")):
            raise Dropped("robots_opt_out", "its server's X-Robots-Tag says so")
        told = response.headers.get("Content-Length", "")
        if told.isdecimal() and int(told) > self._limit:
            raise Failed("too_many_bytes", f"{int(told):,} bytes, limit {self._limit:,}")
        parts, size = [], 0
        while part := response.read1(_CHUNK, decode_content=True):
            parts.append(part)
            size += len(part)
            if size > self._limit:
                raise Failed("too_many_bytes", f"over {self._limit:,} bytes")
        return b"".join(parts)


def check_url(url: str) -> None:
    """Raises Failed: bad_url, without repeating what may be private in it."""
    try:
        parsed = parse_url(url)
    except (faults.HTTPError, ValueError):
        raise Failed("bad_url", "it can't be taken apart") from None
    if parsed.scheme not in ("http", "https"):
        raise Failed("bad_url", "expected http:// or https://")
    if not parsed.host:
        raise Failed("bad_url", "it names no host")
    if parsed.auth is not None:
        raise Failed("bad_url", "it holds a user's name or password, which are not sent")


def is_public(address: str) -> bool:
    """True for addresses of the public internet; those that hold another one (IPv4 in IPv6) are
    judged by both.
    """
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        if found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if found.is_site_local:
            return False
    special = found.is_private or found.is_loopback or found.is_link_local or found.is_multicast
    return found.is_global and not (special or found.is_reserved or found.is_unspecified)


def opts_out(values: list[str]) -> bool:
    """True if any X-Robots-Tag header, whichever agent it names, asks that the picture isn't used."""
    return any(_NO.intersection(re.split(r"[\s,:;]+", value.lower())) for value in values)


def checked_pools(allowed: Allowed) -> dict[str, type[HTTPConnectionPool]]:
    """scheme → connection pool whose connections go to `allowed` addresses only, and end at the
    thread's deadline.
    """

    class Plain(HTTPConnection):
        response_class = _Response

        def _new_conn(self) -> socket.socket:
            return _connect(self, allowed)

    class Secure(HTTPSConnection):
        response_class = _Response

        def _new_conn(self) -> socket.socket:
            return _connect(self, allowed)

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}


def _connect(connection: HTTPConnection, allowed: Allowed) -> socket.socket:
    """A socket to the first of the host's allowed addresses that answers."""
    try:
        found = socket.getaddrinfo(connection._dns_host, connection.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise faults.NewConnectionError(connection, "unknown host") from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    fault: Exception = Refused(
        f"{addresses[0]} is no public address" if addresses else "no address"
    )
    for address in filter(allowed, addresses):
        if time.monotonic() >= _deadline.get():
            raise faults.ConnectTimeoutError(connection, "the deadline has passed")
        try:
            port = connection.port
            return create_connection(
                (address, port), connection.timeout, socket_options=connection.socket_options
            )
        except TimeoutError:
            fault = faults.ConnectTimeoutError(connection, "no answer")
        except OSError as error:
            fault = faults.NewConnectionError(connection, type(error).__name__)
    raise fault


class _Response(HTTPResponse):
    """Waits for each piece, of headers and body, no longer than the socket's timeout and the
    thread's deadline.
    """

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Timed(self.fp.detach(), sock))


class _Timed(io.RawIOBase):
    def __init__(self, raw: io.RawIOBase, sock: socket.socket) -> None:
        super().__init__()
        self._raw, self._sock, self._longest = raw, sock, sock.gettimeout()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = _deadline.get() - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        self._sock.settimeout(left if self._longest is None else min(left, self._longest))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _joined(url: str, target: str) -> str:
    try:
        return urljoin(url, target)
    except ValueError:
        raise Failed("bad_url", "it redirects to what is no URL") from None


def _retry_after(value: str) -> float:
    """Seconds, given as such or as a date; 0.0 where it is neither."""
    try:
        return Retry().parse_retry_after(value)
    except (faults.InvalidHeader, ValueError, OverflowError):
        return 0.0


def _verdict(error: faults.HTTPError) -> Failed:
    """Why a fetch has failed; the error's own text, which may hold the URL, isn't repeated."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Failed("bad_certificate", cause.verify_message)
        cause = cause.__cause__ or cause.__context__
    match error:
        case Refused():
            return Failed("refused_address", str(error))
        case faults.LocationParseError() | faults.LocationValueError() | faults.URLSchemeUnknown():
            return Failed("bad_url", "it can't be taken apart")
        case faults.DecodeError():
            return Failed("bad_encoding", "its Content-Encoding is not what it says")
        case faults.NewConnectionError():
            return Transient(
                "connection", type(error.__cause__ or error.__context__ or error).__name__
            )
        case faults.TimeoutError():
            return Transient("timeout", "no answer in time")
        case _:
            return Transient("connection", type(error).__name__)
