"""A chain with captions from a server, and the configuration for it."""

from __future__ import annotations

from pathlib import Path

from bench.chains import resizing
from configs.schema import DatasetConfig
from stages.backends.weights import Weights
from stages.base import Stage
from stages.caption import CaptionStage
from tests.pipelines.helpers import NO_DEDUPLICATION, config
from tests.stages.chat_server import ChatServer

KEY = "sk-test-c0ffee0ddba11"


def captioned(config: DatasetConfig) -> list[Stage]:
    """Returns resize, a stage that sets the models' fields to constants, and captions."""
    return [*resizing(config), CaptionStage(config.caption, Weights())]


def settings(source: Path, output: Path, server: ChatServer, executor: str) -> DatasetConfig:
    """Returns the configuration: two inputs a shard."""
    return config(
        source,
        output,
        "caption.backend=openai",
        f"caption.openai.base_url={server.base_url}",
        "caption.openai.model=someone/model",
        "caption.openai.tries=1",
        f"executor={executor}",
        "shard_size=2",
        "ray.workers=1",
        *NO_DEDUPLICATION,
    )


def mentions_key(output: Path) -> bool:
    """Returns whether any file of the data set contains the key."""
    files = [path.read_bytes() for path in output.rglob("*") if path.is_file()]
    assert len(files) >= 6
    return any(KEY.encode() in data for data in files)
