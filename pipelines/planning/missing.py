"""Missing sources: what becomes of samples whose input is gone or can't be read any more.

`source.missing` decides. stop: the run ends before it writes anything that loses such a sample.
keep: the sample stays as it is, also where a changed stage would have made it again. drop: the
input is recorded with its reason, like any that can't be read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from configs.errors import SourceError
from pipelines.planning.plan import Plan, ShardTask
from pipelines.sources import Input, Source
from stages.base import Rejection, Stage, run_chain
from stages.record import Record, Status
from stages.storage import layout
from stages.storage.reader import DatasetReader
from stages.storage.store import Store

logger = logging.getLogger(__name__)

_PREFIX: Final = 4096  # bytes of an input that are read before a run starts
_SHOWN: Final = 20  # names in an error
_MANY: Final = 10_000  # inputs from which checking them may take a while


@dataclass(frozen=True, slots=True)
class Loss:
    """A sample that a run would lose. source: the input's name. why: a reason and its detail."""

    source: str
    why: str


def reason_text(reason: str, detail: str) -> str:
    """Returns a reason with its detail, if it has one, in one line."""
    return f"{reason} ({' '.join(detail.split())})" if detail else reason


def check_sources(plan: Plan, tasks: Sequence[ShardTask], store: Store, source: Source) -> None:
    """Raises SourceError if a task would lose samples because their inputs are gone or can't be
    read. Reads the beginning of those inputs only that the run will read and that have a sample.
    """
    losses: list[Loss] = []
    count = 0
    names = {*store.names(layout.SHARDS)}
    tasks = [
        task
        for task in tasks
        if layout.sidecar(task.index) in names
        and (not task.exists or task.inputs_changed or task.retry)
    ]
    if (inputs := sum(task.inputs for task in tasks)) >= _MANY:
        logger.info("checking that the inputs of earlier samples can be read, of %s", f"{inputs:,}")
    for task in tasks:
        samples = DatasetReader(store).sampled_rows(task.index)
        count += len(samples)
        items = [
            item
            for item in plan.inputs_of(task.index)
            if item.key in samples and _is_read(item, task, samples[item.key]["reason"])
        ]
        heads = source.heads([item for item in items if not item.vanished], _PREFIX)
        for item in items:
            if why := _why_unreadable(None if item.vanished else next(heads)):
                losses.append(Loss(item.source, why))
    refuse(losses, count)


def _is_read(item: Input, task: ShardTask, reason: str) -> bool:
    """Returns whether a task needs the bytes of an input with an earlier sample. reason: of it."""
    if not task.exists or reason in task.retry:
        return True
    return task.inputs_changed and not item.vanished  # a vanished input's sample is reused


def _why_unreadable(head: bytes | Rejection | None) -> str:
    """Returns why an input can't be read, or holds nothing; "" if it is fine. head: see
    `Source.heads`; None: it has vanished.
    """
    if head is None:
        return "not_a_file (the source no longer lists it)"
    if isinstance(head, Rejection):
        return reason_text(head.reason, head.detail) if head.status is Status.FAILED else ""
    return "" if any(head) else f"not_an_image (its first {len(head):,} bytes are zeros)"


def refuse(losses: Sequence[Loss], samples: int) -> None:
    """Raises SourceError if there are losses. samples: their number in the shards in question."""
    if not losses:
        return
    names = [f"{loss.source!r}: {loss.why}" for loss in losses[:_SHOWN]]
    if len(losses) > _SHOWN:
        names.append(f"and {len(losses) - _SHOWN:,} more")
    raise SourceError(
        f"{len(losses):,} of {samples:,} samples would be lost, since their inputs can't be read: "
        f"{'; '.join(names)}. Make these readable again, or say what to do with the samples: "
        "source.missing=keep keeps them as they are, source.missing=drop drops them."
    )


def why_lost(
    item: Input, new: Record, old_sha256: str, source: Source, stages: Sequence[Stage]
) -> str:
    """Returns why an input that had a sample can't become one: a reason and its detail; "" if it
    can, or is excluded by a rule.

    new: the input as it was read now. old_sha256: of its earlier bytes. stages: of the chain. Other
    bytes than before are decoded by the stage that makes the image. Exact copies are checked too:
    files that a failing disk has filled with zeros are copies of each other.
    """
    if item.duplicate_of:
        new = source.record(replace(item, duplicate_of=""))
    if new.ok and new.sha256 != old_sha256:
        makers = [stage for stage in stages if "image" in stage.provides][:1]
        [new] = run_chain(makers, [new])
    return reason_text(new.reason, new.detail) if new.status is Status.FAILED else ""
