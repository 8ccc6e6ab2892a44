"""Batches: how many images go through a model together, and what is prepared meanwhile.

While the model works on a batch, a thread prepares the inputs of the next one. A batch that doesn't
fit into memory is tried again in halves. On a GPU the size rises while memory is left.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

_LOG = logging.getLogger(__name__)
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")

MOST_TIMES: Final = 8  # how often the configured batch size the size becomes at most
_MARGIN: Final = 1.25  # answers may become longer than in the batch that was measured
_LEFT: Final = 0.9  # share of the memory that other processes leave which is used
# parts of the messages with which torch, CUDA's libraries, C++ and Linux report a lack of memory
_MESSAGES: Final = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "ALLOC_FAILED",
    "bad_alloc",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Memory of a GPU, in bytes. before, peak: what this process had allocated before a batch, and
    the most during it. reserved: what this process holds. free: what no process holds.
    """

    before: int
    peak: int
    reserved: int
    free: int
    total: int


class Meter(Protocol):
    """Measures the memory of batches."""

    def start(self) -> None:
        """A batch begins."""
        ...

    def usage(self) -> Usage:
        """Returns the usage since `start`."""
        ...


class GpuMeter:
    """Measures batches on a CUDA device, such as cuda:0."""

    def __init__(self, device: str) -> None:
        self._device, self._before = device, 0

    def start(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def usage(self) -> Usage:
        import torch

        free, total = torch.cuda.mem_get_info(self._device)
        return Usage(
            before=self._before,
            peak=torch.cuda.max_memory_allocated(self._device),
            reserved=torch.cuda.memory_reserved(self._device),
            free=free,
            total=total,
        )


def twice_fits(usage: Usage, share: float) -> bool:
    """Returns whether twice the batch fits into `share` (0 to 1) of the GPU's memory, and into what
    other processes leave of it.
    """
    needed = usage.before + _MARGIN * 2 * (usage.peak - usage.before)
    return needed <= min(share * usage.total, _LEFT * (usage.free + usage.reserved))


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error reports a lack of memory, of a GPU or of this process."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _MESSAGES)


class BatchSizes:
    """How many images a batch has: the configured number, or what was learnt since."""

    def __init__(self) -> None:
        self._times, self._limit = 1, 0

    def size(self, batch_size: int) -> int:
        """Returns the size to use where `batch_size` is configured."""
        size = batch_size * self._times
        return min(size, self._limit) if self._limit else size

    def halve(self, count: int) -> None:
        """A batch of `count` images, at least 2, didn't fit. No later one has more than half."""
        self._limit = count // 2

    def double(self) -> None:
        """A batch of twice the size fits. Has no effect after `halve`."""
        if not self._limit:
            self._times = min(2 * self._times, MOST_TIMES)


class Batches:
    """Takes items through a model in batches, and remembers which sizes fit.

    device: the model's. memory_share: share of a GPU's memory up to which sizes rise; 0: they
    don't, nor do they on a CPU, where larger batches gain nothing.
    """

    def __init__(self, device: str, memory_share: float) -> None:
        self.sizes, self._device, self._share = BatchSizes(), device, memory_share
        rises = device.startswith("cuda") and memory_share > 0
        self.meter: Meter | None = GpuMeter(device) if rises else None

    def run(
        self,
        items: Sequence[int],
        batch_size: int,
        prepare: Callable[[Sequence[int]], Prepared],
        process: Callable[[Prepared], Sequence[Result]],
    ) -> dict[int, Result]:
        """Returns item → result.

        prepare: makes the model's inputs of a batch, in a thread, at most one batch ahead. process:
        returns the results of a batch, in order. Both may be called again for items whose batch
        didn't fit into memory. Raises what they raise, and a lack of memory for one item.
        """
        results: dict[int, Result] = {}
        with ThreadPoolExecutor(1, thread_name_prefix="preprocess") as thread:
            ahead: Future[Prepared] | None = None
            batch = items[: self.sizes.size(batch_size)]
            while batch:
                future = ahead or thread.submit(prepare, batch)
                rest = items[len(results) + len(batch) :]
                following = rest[: self.sizes.size(batch_size)]
                try:
                    prepared = future.result()
                    ahead = thread.submit(prepare, following) if following else None
                    done = self._processed(process, prepared, len(batch), batch_size)
                except (MemoryError, RuntimeError) as error:
                    if len(batch) == 1 or not is_out_of_memory(error):
                        raise
                    done = None
                # behind `except`: until its end, the error's traceback holds the batch's tensors
                if done is not None:
                    results |= zip(batch, done, strict=True)
                    batch = following
                    continue
                self.sizes.halve(len(batch))
                _LOG.warning(
                    "%d images don't fit into memory together; batches have at most %d from now on",
                    len(batch),
                    self.sizes.size(batch_size),
                )
                if ahead is not None and not ahead.cancel():
                    wait([ahead])
                future = prepared = ahead = None  # type: ignore[assignment]
                batch = batch[: self.sizes.size(batch_size)]
                self._free()
        return results

    def _processed(
        self,
        process: Callable[[Prepared], Sequence[Result]],
        prepared: Prepared,
        count: int,
        batch_size: int,
    ) -> Sequence[Result]:
        """Returns the results of `count` items. Later batches are larger if twice as many fit."""
        if self.meter is None or count < self.sizes.size(batch_size):
            return process(prepared)
        self.meter.start()
        results = process(prepared)
        if twice_fits(self.meter.usage(), self._share):
            self.sizes.double()
        return results

    def _free(self) -> None:
        import torch

        gc.collect()
        if self._device.startswith("cuda"):
            torch.cuda.empty_cache()
