"""Fetches one image from a URL: from public addresses only, within limits of time and size, and
only if its server doesn't opt out.

A host name is resolved once; the address is checked, and the connection goes to that very address,
so a second DNS answer can't lead elsewhere (DNS rebinding). TLS still verifies the host name. Each
redirect is checked in the same way. Proxy settings in the environment are ignored.
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

from pipelines.sources.base import TransientFailure
from stages.base import Dropped, Failed

USER_AGENT: Final = "consistentid-pipeline/0.1 (collects images for a data set; heeds X-Robots-Tag)"
_HEADERS: Final = {
    "User-Agent": USER_AGENT,
    "Accept": "image/*,*/*;q=0.5",
    "Accept-Encoding": "identity",
}
_MAX_REDIRECTS: Final = 5
_DEADLINE_FACTOR: Final = 10  # a fetch, redirects included, may take this many times `timeout`
_CHUNK: Final = 1 << 18  # bytes
_TRANSIENT_STATUS: Final = frozenset({408, 425, 429})  # and all from 500 on
_OPT_OUT: Final = frozenset({"noai", "noimageai", "noindex", "noimageindex"})
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")

AddressCheck = Callable[[str], bool]  # True if the IP address, as text, may be connected to
# time.monotonic() at which the current thread's fetch is given up
_deadline: ContextVar[float] = ContextVar("deadline")


class RefusedAddress(faults.HTTPError):
    """None of the host's addresses may be connected to."""


class Fetcher:
    """Fetches images by URL. Safe to use from several threads.

    is_allowed: whether an address may be connected to. timeout: seconds to connect, and seconds
    between two received parts. max_bytes: of one image, decompressed. concurrency: number of
    threads that fetch at a time.
    """

    def __init__(
        self,
        is_allowed: AddressCheck,
        timeout: float,
        max_bytes: int,
        ignore_robots: bool,
        concurrency: int,
    ) -> None:
        self._timeout, self._max_bytes, self._ignore_robots = timeout, max_bytes, ignore_robots
        self._pools = PoolManager(num_pools=2 * concurrency, maxsize=concurrency, headers=_HEADERS)
        self._pools.pool_classes_by_scheme = checked_pools(is_allowed)

    def fetch(self, url: str) -> bytes:
        """Returns the response body of `url`, after redirects.

        Raises Failed: bad_url, refused_address, bad_certificate, too_many_redirects,
        too_many_bytes, bad_encoding, http_<status>; TransientFailure: connection, timeout, cut_off,
        http_<status>; Dropped: robots_opt_out.
        """
        _deadline.set(time.monotonic() + _DEADLINE_FACTOR * self._timeout)
        for _ in range(_MAX_REDIRECTS + 1):
            try:
                check_url(url)
                response = self._request(url)
            except faults.HTTPError as error:
                raise _to_failure(error) from None
            try:
                target = response.get_redirect_location()
                if not target:
                    return self._read_body(response)
                url = _resolve_redirect(url, target)
            except faults.ProtocolError:
                raise TransientFailure("cut_off", "the body ended early") from None
            except faults.HTTPError as error:
                raise _to_failure(error) from None
            finally:
                response.close()
        raise Failed("too_many_redirects", f"more than {_MAX_REDIRECTS}")

    def _request(self, url: str) -> BaseHTTPResponse:
        return self._pools.request(
            "GET",
            url,
            redirect=False,
            retries=False,
            preload_content=False,
            timeout=Timeout(connect=self._timeout, read=self._timeout),
        )

    def _read_body(self, response: BaseHTTPResponse) -> bytes:
        if response.status != 200:
            reason = f"http_{response.status}"
            if response.status in _TRANSIENT_STATUS or response.status >= 500:
                seconds = _retry_after(response.headers.get("Retry-After", ""))
                raise TransientFailure(reason, retry_after=seconds)
            raise Failed(reason)
        if not self._ignore_robots and opts_out(response.headers.getlist("X-Robots-Tag")):
            raise Dropped("robots_opt_out", "its server's X-Robots-Tag says so")
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) > self._max_bytes:
            raise Failed("too_many_bytes", f"{int(length):,} bytes, limit {self._max_bytes:,}")
        parts, size = [], 0
        while part := response.read1(_CHUNK, decode_content=True):
            parts.append(part)
            size += len(part)
            if size > self._max_bytes:
                raise Failed("too_many_bytes", f"over {self._max_bytes:,} bytes")
        return b"".join(parts)


def check_url(url: str) -> None:
    """Raises Failed bad_url unless `url` is an http(s) URL with a host and without credentials.

    The detail doesn't repeat the URL, which may hold a password or token.
    """
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
    """True if `address` belongs to the public internet.

    An IPv6 address that embeds an IPv4 address (mapped, 6to4, Teredo, NAT64) counts as the
    embedded one.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if ip in _NAT64:
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded is not None:
            return is_public(str(embedded))
        if ip.is_site_local:
            return False
    special = ip.is_private or ip.is_loopback or ip.is_link_local or ip.is_multicast
    return ip.is_global and not (special or ip.is_reserved or ip.is_unspecified)


def opts_out(values: list[str]) -> bool:
    """True if any of the X-Robots-Tag headers `values` asks not to use the image, for any agent."""
    return any(_OPT_OUT.intersection(re.split(r"[\s,:;]+", value.lower())) for value in values)


def checked_pools(is_allowed: AddressCheck) -> dict[str, type[HTTPConnectionPool]]:
    """Returns scheme → urllib3 connection pool class.

    Its connections go to allowed addresses only, and reading ends at the thread's deadline.
    """

    class CheckedConnection(HTTPConnection):
        response_class = _Response

        def _new_conn(self) -> socket.socket:
            return _connect(self, is_allowed)

    class CheckedTLSConnection(HTTPSConnection):
        response_class = _Response

        def _new_conn(self) -> socket.socket:
            return _connect(self, is_allowed)

    class HTTPPool(HTTPConnectionPool):
        ConnectionCls = CheckedConnection

    class HTTPSPool(HTTPSConnectionPool):
        ConnectionCls = CheckedTLSConnection

    return {"http": HTTPPool, "https": HTTPSPool}


def _connect(connection: HTTPConnection, is_allowed: AddressCheck) -> socket.socket:
    """Returns a socket to the first of the host's allowed addresses that answers."""
    try:
        infos = socket.getaddrinfo(connection._dns_host, connection.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise faults.NewConnectionError(connection, "unknown host") from error
    addresses = list(dict.fromkeys(str(info[4][0]) for info in infos))
    fault: Exception = RefusedAddress(
        f"{addresses[0]} is no public address" if addresses else "no address"
    )
    for address in filter(is_allowed, addresses):
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
    """A response whose headers and body are read through _DeadlineReader."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_DeadlineReader(self.fp.detach(), sock))


class _DeadlineReader(io.RawIOBase):
    """Limits each read to the socket's timeout and to what is left until the thread's deadline.

    The socket's timeout alone doesn't end a response that arrives slowly, byte by byte.
    """

    def __init__(self, raw: io.RawIOBase, sock: socket.socket) -> None:
        super().__init__()
        self._raw, self._sock, self._timeout = raw, sock, sock.gettimeout()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        remaining = _deadline.get() - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the deadline has passed")
        self._sock.settimeout(remaining if self._timeout is None else min(remaining, self._timeout))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _resolve_redirect(url: str, target: str) -> str:
    """Returns the absolute URL of a redirect. Raises Failed bad_url."""
    try:
        return urljoin(url, target)
    except ValueError:
        raise Failed("bad_url", "it redirects to what is no URL") from None


def _retry_after(value: str) -> float:
    """Seconds to wait from a Retry-After header (seconds or a date); 0.0 if it is neither."""
    try:
        return Retry().parse_retry_after(value)
    except (faults.InvalidHeader, ValueError, OverflowError):
        return 0.0


def _to_failure(error: faults.HTTPError) -> Failed:
    """Returns the failure for a urllib3 error. Its text is left out, as it may hold the URL."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Failed("bad_certificate", cause.verify_message)
        cause = cause.__cause__ or cause.__context__
    match error:
        case RefusedAddress():
            return Failed("refused_address", str(error))
        case faults.LocationParseError() | faults.LocationValueError() | faults.URLSchemeUnknown():
            return Failed("bad_url", "it can't be taken apart")
        case faults.DecodeError():
            return Failed("bad_encoding", "its Content-Encoding is not what it says")
        case faults.NewConnectionError():
            cause = error.__cause__ or error.__context__ or error
            return TransientFailure("connection", type(cause).__name__)
        case faults.TimeoutError():
            return TransientFailure("timeout", "no answer in time")
        case _:
            return TransientFailure("connection", type(error).__name__)
