"""Fixtures for tests of storage on S3."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import boto3
import fsspec
import pytest
import tenacity

from tests.stages.storage.s3_server import ENVIRONMENT, Bucket, Proxy, proxy, s3_server


@pytest.fixture(scope="module")
def server_and_client() -> Iterator[tuple[Proxy, Any]]:
    """The proxy, and a client that connects to the server directly. Environment variables name the
    proxy and the keys, as for a user.
    """
    with s3_server() as port, proxy(port) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("FSSPEC_S3_ENDPOINT_URL", server.url)
        patch.setitem(fsspec.config.conf, "s3", {})
        fsspec.config.set_conf_env(fsspec.config.conf)  # as at import
        yield server, boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")


@pytest.fixture(scope="module")
def short_pauses() -> Iterator[None]:
    """Makes pauses of this process twenty times shorter: before retries, and after a lock was
    created.
    """
    shorter = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.storage.lock._SETTLE", 1.0 / 20)
        patch.setattr(tenacity.nap, "time", shorter)
        yield


@pytest.fixture
def bucket(server_and_client: tuple[Proxy, Any]) -> Bucket:
    server, client = server_and_client
    server.reset()
    return Bucket(client, server)
