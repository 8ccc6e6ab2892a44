"""File systems of fsspec URLs: credentials are refused in URLs, and temporary errors recognised."""

from __future__ import annotations

import asyncio
import errno
import re
from typing import Any, Final

import fsspec

from configs.errors import ConfigError

_PASSWORD: Final = re.compile(r"(?<=://)[^/@]*:[^/]*@")
_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    # parts of 50 MiB in memory at a time; s3fs's default of 10 would take a gigabyte a writer
    "s3": {"max_concurrency": 2}
}
_STATUS: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_ERRNO: Final = frozenset({errno.EIO, errno.ETIMEDOUT, errno.EBUSY, errno.EAGAIN})
_CODES: Final = frozenset(
    (
        *("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"),  # damaged on the way
        "NoSuchUpload",  # a retry, after the response to a finished upload was lost
    )
)
_NAMES: Final = frozenset(
    (
        *("ClientConnectionError", "ClientPayloadError", "ConnectTimeoutError"),
        *("ConnectionClosedError", "EndpointConnectionError", "HTTPClientError", "IncompleteRead"),
        *("ReadTimeoutError", "ResponseParserError", "ResponseStreamingError"),
        *("ServerDisconnectedError", "ServerTimeoutError", "TransportError"),
    )
)


def refuse_credentials(url: str) -> None:
    """Raises ConfigError for a URL with a password in it. All URLs of a configuration are checked
    before they are printed or written.
    """
    if _PASSWORD.search(url):
        raise ConfigError(
            f"{_PASSWORD.sub('…@', url)} was given with a password in it, which would be written "
            "to the output. Give credentials in the environment instead: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or FSSPEC_*."
        )


def file_system(url: str) -> tuple[Any, str]:
    """Returns the file system of a folder or fsspec URL, without a cache of listings, and the path
    on it.

    Keys and endpoints come from the environment of each process, never from the URL. Raises
    ConfigError for a URL with a password, of an unknown protocol, or without a path.
    """
    refuse_credentials(url)
    try:
        protocol = url.partition("://")[0]
        options = _OPTIONS.get(protocol, {}) | fsspec.config.conf.get(protocol, {})
        fs, path = fsspec.url_to_fs(url, use_listings_cache=False, **options)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"{url!r} can't be opened: {error}. Give a folder or an fsspec URL; s3:// needs "
            "`pip install -e '.[s3]'`."
        ) from error
    if "://" in url and not str(path).strip("/"):
        raise ConfigError(
            f"{url!r} has no path. Give a bucket and a folder, as in s3://bucket/folder."
        )
    return fs, str(path)


def is_local(fs: Any) -> bool:
    """Returns whether this is the local file system."""
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def is_transient(error: BaseException) -> bool:
    """Returns whether the same request may succeed later: after a timeout, a broken connection, or
    status 408, 425, 429, 500, 502, 503 or 504.
    """
    status = next(
        filter(None, (getattr(error, name, None) for name in ("status", "status_code", "code"))),
        None,
    )
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's ClientError
        if response.get("Error", {}).get("Code") in _CODES:
            return True
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
