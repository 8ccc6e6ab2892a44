"""Source: what every source implements. The driver lists its inputs, workers read their bytes."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Final

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from configs.schema import DatasetConfig
from pipelines.sources.passed_over import PassedOver
from stages.base import Dropped, Failed, Rejection, reject
from stages.record import PROVENANCE, Record, key_of

STAGE: Final = "source"  # the `stage` of records that are dropped or failed while reading
_MAX_WAIT: Final = 30.0  # seconds between two attempts, even if a server asks for more


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One planned input.

    source: its name, unique in the data set, relative to the source's root.
    locator: what the source needs to read it, as bytes, since file names need not be text.
    size: in bytes; -1 if unknown.
    version: a value that changes whenever the content may have changed (modification time, ETag);
        "" if unknown.
    provenance: a JSON object with those fields of PROVENANCE that the source states; "" if none.
    duplicate_of: the `source` of an earlier input with the same bytes; "" if there is none.
    vanished: the source no longer lists it, so its locator may lead to another input's bytes.
    nameless_key: the key of a removed input whose name isn't known any more; `source` is "" then.
    """

    source: str
    locator: bytes
    size: int = -1
    version: str = ""
    provenance: str = ""
    duplicate_of: str = ""
    vanished: bool = False
    nameless_key: str = ""

    @property
    def key(self) -> str:
        """The record's key: 20 hex digits, see `key_of`."""
        return self.nameless_key or key_of(self.source)

    @property
    def stated(self) -> dict[str, str]:
        """`provenance` as a mapping of names to texts."""
        stated: dict[str, str] = json.loads(self.provenance) if self.provenance else {}
        return stated

    @property
    def revision(self) -> str:
        """A text that changes whenever the content may have changed, or the person has. It is
        `size` and `version` where no person is stated, as in plans of version 0.1.
        """
        person = self.stated.get("person")
        return f"{self.size} {self.version}" + (f" {json.dumps(person)}" if person else "")


class TransientFailure(Failed):
    """A failure that may not happen again, such as a timeout or status 503: reading is retried.

    retry_after: seconds that the server asks to wait before the next attempt.
    """

    def __init__(self, reason: str, detail: str = "", retry_after: float = 0.0) -> None:
        super().__init__(reason, detail)
        self.retry_after = retry_after


class Source(ABC):
    """A place that input images come from. Lists inputs on the driver, reads them on workers.

    Keeps no state between calls, except for `passed_over`, what the last `list` didn't yield.
    """

    concurrency: int = 1  # inputs read at a time; more than 1 where reading mostly waits

    def __init__(self, config: DatasetConfig) -> None:
        self.config = config.source
        self.max_bytes = config.resize.max_bytes
        self.output = config.output
        self.passed_over = PassedOver()

    @abstractmethod
    def list(self) -> Iterator[Input]:
        """Yields every input, in any order, without collecting them in memory.

        Raises SourceError if the source can't be listed.
        """

    @abstractmethod
    def read(self, item: Input, count: int = -1) -> bytes:
        """Returns the input's bytes, or the first `count` of them (-1: all).

        Raises Failed, Dropped or TransientFailure.
        """

    def heads(self, items: Sequence[Input], count: int) -> Iterator[bytes | Rejection]:
        """Yields the first `count` bytes of each input, in order, or why it can't be read."""
        head = partial(self._head, count=count)
        if self.concurrency == 1:
            yield from map(head, items)
            return
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix=STAGE) as pool:
            yield from pool.map(head, items)

    def _head(self, item: Input, count: int) -> bytes | Rejection:
        try:
            return self.read_with_retries(item, count)
        except Rejection as rejection:
            return rejection

    def provided_fields(self, item: Input) -> frozenset[str]:
        """Returns the record fields that come with this input.

        A stage that provides only such fields isn't run for it.
        """
        return frozenset()

    def read_with_retries(self, item: Input, count: int = -1) -> bytes:
        """Returns what `read` returns; after a TransientFailure tries again, `source.tries` times
        in all. Raises Failed or Dropped.
        """
        data: bytes = self._retrying(self.read, item, count)
        return data

    def add_provided_fields(self, record: Record, item: Input) -> Record:
        """Returns `record`, whose image has been read, with its input's `provided_fields` set."""
        return record

    def is_unchanged(self, old: Record, new: Record) -> bool:
        """True if `new`, just read, has the same bytes as `old`, the record of an earlier run; if
        it couldn't be read, True if `old` failed in the same way. Their provenance may differ.
        """
        fields = ("sha256",) if new.ok else ("status", "reason", "detail", "stage")
        return all(getattr(old, name) == getattr(new, name) for name in fields)

    def record(self, item: Input, read: Callable[[Input], bytes] | None = None) -> Record:
        """Reads one input and returns its record, dropped or failed if it couldn't be read.

        `image` holds the source's bytes as they are. read: called in place of `self.read`, for
        sources that read several inputs at once.
        """
        stated = item.stated
        # there is no setting `person`, which would make all inputs one person
        provenance: dict[str, Any] = {
            name: stated.get(name) or getattr(self.config, name, "") for name in PROVENANCE
        }
        record = Record(key=item.key, source=item.source, **provenance)
        try:
            if item.vanished:
                raise Failed("not_a_file", "the source no longer lists it")
            if item.duplicate_of:
                raise Dropped("duplicate", f"same bytes as {item.duplicate_of}")
            data = self._retrying(read, item) if read else self.read_with_retries(item)
            record = replace(record, image=data, sha256=hashlib.sha256(data).hexdigest())
            return self.add_provided_fields(record, item)
        except Rejection as rejection:
            return reject(record, rejection, STAGE)

    def records(self, items: Sequence[Input]) -> Iterator[Record]:
        """Yields the records of `items`, in order; reads `concurrency` of them at a time."""
        if self.concurrency == 1 or len(items) < 2:
            yield from map(self.record, items)
            return
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix=STAGE)
        try:
            yield from pool.map(self.record, items)
        finally:
            # Don't wait: a run that is being stopped must not be delayed by a server that hangs.
            pool.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def _retrying(self) -> Retrying:
        return Retrying(
            retry=retry_if_exception_type(TransientFailure),
            stop=stop_after_attempt(self.config.tries),
            wait=self._wait,
            reraise=True,
        )

    def _wait(self, state: RetryCallState) -> float:
        """Seconds until the next attempt: random exponential backoff, or what the server asked for
        if that is longer; at most _MAX_WAIT.
        """
        error = state.outcome.exception() if state.outcome else None
        requested = error.retry_after if isinstance(error, TransientFailure) else 0.0
        backoff = wait_random_exponential(multiplier=self.config.backoff, max=_MAX_WAIT)(state)
        return min(max(backoff, requested), _MAX_WAIT)
