"""What every source is: a list of inputs at planning, and their bytes on the workers."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from configs.schema import DatasetConfig
from stages.base import Dropped, Failed, Rejection, reject
from stages.record import Record, key_of

STAGE = "source"
# what a source may state of a picture: record fields
FACTS: Final = ("license", "author", "consent")
_LONGEST_WAIT: Final = 30.0  # seconds between two tries, whatever a server asks for


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One planned input.

    source: its name, unique in the data set, relative to the source's root. locator: how the source
    finds it again, as bytes (file names need not be text). size: bytes, -1 where unknown. version:
    changes whenever the content may have (a time of change, an ETag), "" where nothing is known.
    facts: what the source states of it (license, author, …) as a JSON object, "" for nothing.
    duplicate_of: the source of an earlier input with the very same bytes.
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
    """Can't be read now, but may be in a moment: a timeout, a 503. Tried again before it is
    believed.

    after: seconds that the server asks to wait before the next try.
    """

    def __init__(self, reason: str, detail: str = "", after: float = 0.0) -> None:
        super().__init__(reason, detail)
        self.after = after


class Source(ABC):
    """A kind of place that photographs come from. Lists on the driver, reads on the workers; holds
    no state.
    """

    concurrency: int = 1  # reads at a time; over 1 where reading is waiting

    def __init__(self, config: DatasetConfig) -> None:
        self.config = config.source
        self.limit = config.resize.max_bytes
        self.output = config.output

    @abstractmethod
    def list(self) -> Iterator[Input]:
        """Every input, in no particular order, without holding them all. Raises SourceError if
        there can be none.
        """

    @abstractmethod
    def read(self, item: Input, count: int = -1) -> bytes:
        """The input's bytes, or the first `count` of them. Raises Failed, Dropped or Transient."""

    def gives(self, item: Input) -> frozenset[str]:
        """Record fields that come with this input: a stage that provides nothing else isn't run for
        it.
        """
        return frozenset()

    def fetch(self, item: Input, count: int = -1) -> bytes:
        """`read`, tried again while its failure may pass. Raises Failed or Dropped."""
        data: bytes = self._retrying(self.read, item, count)
        return data

    def complete(self, record: Record, item: Input) -> Record:
        """`record`, whose image has been read, with what else comes with its input (see `gives`)."""
        return record

    def same(self, old: Record, new: Record) -> bool:
        """True if `new` is what `old` was made of: the same bytes, or the same reason to give none."""
        if new.ok:
            return all(getattr(old, name) == getattr(new, name) for name in ("sha256", *FACTS))
        return (old.status, old.reason, old.detail, old.stage) == (
            new.status,
            new.reason,
            new.detail,
            new.stage,
        )

    def record(self, item: Input, read: Callable[[Input], bytes] | None = None) -> Record:
        """The record of one input, its image the source's own bytes; ended already where it can't
        be read.

        read: in place of `self.read`, for sources that read several inputs at once.
        """
        facts: dict[str, Any] = json.loads(item.facts) if item.facts else {}
        record = Record(
            key=item.key,
            source=item.source,
            **{name: facts.get(name) or getattr(self.config, name) for name in FACTS},
        )
        try:
            if item.duplicate_of:
                raise Dropped("duplicate", f"same bytes as {item.duplicate_of}")
            data = self._retrying(read, item) if read else self.fetch(item)
            record = replace(record, image=data, sha256=hashlib.sha256(data).hexdigest())
            return self.complete(record, item)
        except Rejection as verdict:
            return reject(record, verdict, STAGE)

    def records(self, items: Sequence[Input]) -> Iterator[Record]:
        """The records of `items`, in order; `concurrency` are read at a time."""
        if self.concurrency == 1 or len(items) < 2:
            yield from map(self.record, items)
            return
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix=STAGE)
        try:
            yield from pool.map(self.record, items)
        finally:  # where a run is stopped, a server that hangs must not hold it up
            pool.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def _retrying(self) -> Retrying:
        return Retrying(
            retry=retry_if_exception_type(Transient),
            stop=stop_after_attempt(self.config.tries),
            wait=self._wait,
            reraise=True,
        )

    def _wait(self, state: RetryCallState) -> float:
        """Seconds until the next try: at random, growing, and no less than the server has asked
        for.
        """
        error = state.outcome.exception() if state.outcome else None
        asked = error.after if isinstance(error, Transient) else 0.0
        growing = wait_random_exponential(multiplier=self.config.backoff, max=_LONGEST_WAIT)(state)
        return min(max(growing, asked), _LONGEST_WAIT)
