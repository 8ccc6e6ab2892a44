"""What every source is: a list of inputs at planning, and their bytes on the workers."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from configs.schema import DatasetConfig
from stages.base import Dropped, Failed, Rejection, reject
from stages.record import Record, key_of

STAGE = "source"


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One planned input.

    source: its name, unique in the data set, relative to the source's root. locator: how the source finds it again, as
    bytes (file names need not be text). size: bytes, -1 where unknown. version: changes whenever the content may have
    (a time of change, an ETag), "" where nothing is known. facts: what the source states of it (license, author, …) as
    a JSON object, "" for nothing. duplicate_of: the source of an earlier input with the very same bytes.
    """

    source: str
    locator: bytes
    size: int = -1
    version: str = ""
    facts: str = ""
    duplicate_of: str = ""

    @property
    def key(self) -> str:
        return key_of(self.source)


class Transient(Failed):
    """Can't be read now, but may be in a moment: a timeout, a 503. Tried again before it is believed."""


class Source(ABC):
    """A kind of place that photographs come from. Lists on the driver, reads on the workers; holds no state."""

    concurrency: ClassVar[int] = 1  # reads at a time; over 1 where reading is waiting
    gives: ClassVar[frozenset[str]] = frozenset()  # record fields that come with it, so their stages needn't run

    def __init__(self, config: DatasetConfig) -> None:
        self.config = config.source
        self.limit = config.resize.max_bytes
        self.output = config.output

    @abstractmethod
    def list(self) -> Iterator[Input]:
        """Every input, in no particular order, without holding them all. Raises SourceError if there can be none."""

    @abstractmethod
    def read(self, item: Input, count: int = -1) -> bytes:
        """The input's bytes, or the first `count` of them. Raises Failed, Dropped or Transient."""

    def fetch(self, item: Input, count: int = -1) -> bytes:
        """`read`, tried again while its failure may pass. Raises Failed or Dropped."""
        return self._retrying(self.read, item, count)

    def complete(self, record: Record, item: Input) -> Record:
        """`record`, whose image has been read, with whatever else this source brings (see `gives`)."""
        return record

    def record(self, item: Input) -> Record:
        """The record of one input, its image the source's own bytes; ended already where it can't be read."""
        facts: dict[str, Any] = json.loads(item.facts) if item.facts else {}
        record = Record(
            key=item.key,
            source=item.source,
            license=facts.get("license") or self.config.license,
            author=facts.get("author") or self.config.author,
        )
        try:
            if item.duplicate_of:
                raise Dropped("duplicate", f"same bytes as {item.duplicate_of}")
            data = self.fetch(item)
            record = replace(record, image=data, sha256=hashlib.sha256(data).hexdigest())
            return self.complete(record, item)
        except Rejection as verdict:
            return reject(record, verdict, STAGE)

    def records(self, items: Sequence[Input]) -> Iterator[Record]:
        """The records of `items`, in order; `concurrency` are read at a time."""
        if self.concurrency == 1 or len(items) < 2:
            yield from map(self.record, items)
            return
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix=STAGE) as pool:
            yield from pool.map(self.record, items)

    @cached_property
    def _retrying(self) -> Retrying:
        return Retrying(
            retry=retry_if_exception_type(Transient),
            stop=stop_after_attempt(self.config.tries),
            wait=wait_random_exponential(multiplier=0.5, max=30),
            reraise=True,
        )
