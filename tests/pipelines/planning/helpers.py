"""Helpers for tests of planning: stages without models, a source in memory, complete records."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from configs.schema import DatasetConfig, ResizeConfig
from pipelines.sources import Input, Source
from stages.base import Failed, Stage
from stages.codec import encode_labels
from stages.record import Record, key_of

LABELS = encode_labels(np.zeros((4, 4), np.uint8))
IDENTITY = np.full(512, 512**-0.5, np.float32)


class Stub(Stage):
    def process(self, records: list[Record]) -> list[Record]:
        raise AssertionError(f"planning must not run stage {self.name}")


class Decoder(Stub):
    """May be run, to see whether an input is an image."""

    def process(self, records: list[Record]) -> list[Record]:
        return records


def stub(
    name: str,
    requires: tuple[str, ...] = (),
    provides: tuple[str, ...] = (),
    version: int = 1,
) -> Stage:
    """Returns a stage; only one that provides images may be run."""
    values = {"name": name, "requires": requires, "provides": provides, "version": version}
    kind = Decoder if "image" in provides else Stub
    return type(name, (kind,), values)(ResizeConfig())


def chain(**versions: int) -> list[Stage]:
    """Returns five stages. Each requires what the one before provides, except the last, which
    requires the image. versions: of stages whose version isn't 1.
    """
    links: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
        ("resize", ("image",), ("image", "width")),
        ("detect", ("image",), ("faces",)),
        ("quality_filter", ("faces",), ()),
        ("caption", ("faces",), ("caption",)),
        ("measure", ("image",), ("measures",)),
    )
    return [stub(*link, version=versions.get(link[0], 1)) for link in links]


def sample(source: str, **changes: Any) -> Record:
    """Returns a complete record, as after all stages."""
    values: dict[str, Any] = {
        "key": key_of(source),
        "source": source,
        "image": b"jpeg",
        "parsing": LABELS,
        "identity": IDENTITY,
        "caption": "a face",
        **changes,
    }
    return Record(**values)


class Memory(Source):
    """A source in memory. data: name → bytes. unreadable: names of inputs that can't be read.
    provided: the fields that each input provides. reads: (name, number of bytes) of each read.
    """

    def __init__(
        self,
        data: dict[str, bytes],
        unreadable: frozenset[str] = frozenset(),
        provided: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(DatasetConfig())
        self.data, self.unreadable, self.provided = data, unreadable, provided
        self.reads: list[tuple[str, int]] = []

    def list(self) -> Iterator[Input]:
        for name, data in self.data.items():
            yield Input(source=name, locator=name.encode(), size=len(data))

    def read(self, item: Input, count: int = -1) -> bytes:
        self.reads.append((item.source, count))
        if item.source in self.unreadable:
            raise Failed("unreadable")
        data = self.data[item.source]
        return data if count < 0 else data[:count]

    def provided_fields(self, item: Input) -> frozenset[str]:
        return self.provided
