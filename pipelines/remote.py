"""What is worth trying again when a remote store or server has answered with an error."""

from __future__ import annotations

import asyncio
import errno

_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_ERRNO = frozenset({errno.EIO, errno.ETIMEDOUT, errno.EBUSY, errno.EAGAIN})
_NAMES = frozenset(
    {
        "ClientConnectionError", "ClientPayloadError", "ConnectTimeoutError", "ConnectionClosedError",
        "EndpointConnectionError", "HTTPClientError", "IncompleteRead", "ReadTimeoutError", "ResponseStreamingError",
        "ServerDisconnectedError", "ServerTimeoutError",
    }
)  # fmt: skip


def is_transient(error: BaseException) -> bool:
    """True where the same request may succeed in a moment: timeouts, cut connections, 408, 429 and the 5xx kind."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's ClientError
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif response is not None:
        status = getattr(response, "status_code", status)
    if status in _STATUS:
        return True
    if isinstance(error, TimeoutError | ConnectionError | asyncio.TimeoutError | EOFError):
        return True
    if isinstance(error, OSError) and error.errno in _ERRNO:
        return True
    if any(kind.__name__ in _NAMES for kind in type(error).__mro__):
        return True
    return error.__cause__ is not None and is_transient(error.__cause__)
