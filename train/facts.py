"""What all processes must know of a step, and what follows from it: samples that were left out,
updates that were skipped, and whether to stop.

Each step adds up two numbers over the processes. They are read when the next step has been started,
so that no device waits for the host. So a signal to one process stops all of them at the same step,
at most two steps later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from configs.errors import TrainingError
from configs.training import TrainConfig
from train.history import Lines
from train.packing import BadSample

SKIPPED: Final = "skipped.jsonl"  # bad samples, which were left out
NONFINITE: Final = "nonfinite.jsonl"  # steps whose update was skipped, and their samples
_NAMED: Final = 8  # samples in a message


class HostCopy:
    """A copy of a tensor in the CPU's memory, which a GPU makes in its turn. `tolist` waits for
    that, but not for what was given to the GPU later.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if values.is_cuda:
            event: Any = torch.cuda.Event
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = event()
            self._copied.record()

    def tolist(self) -> list[float]:
        if self._copied is not None:
            self._copied.synchronize()
        return [float(value) for value in self._values]


@dataclass(frozen=True, slots=True)
class StepFacts:
    """Of one step. position: of its first sample. numbers: valid samples and processes that
    received a signal, of all processes; 1 if the update was skipped, else 0. bad: this process's
    bad samples.
    """

    step: int
    position: int
    numbers: HostCopy
    bad: tuple[BadSample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """batch: samples of a step. samples: of the data set. bad_share: share of these that may be
    bad. nonfinite_steps: consecutive steps whose update may be skipped.
    """

    batch: int
    samples: int
    bad_share: float
    nonfinite_steps: int

    @classmethod
    def of(cls, config: TrainConfig, samples: int) -> Limits:
        return cls(
            batch=config.global_batch_size,
            samples=samples,
            bad_share=config.max_bad_share,
            nonfinite_steps=config.max_nonfinite_steps,
        )


class StepCheck:
    """Checks the facts of every step, in order, on each process.

    output: the run's folder. step: that it resumes from. keys_at: position → the keys of the sample
    and of its reference, which gives the conditions.
    gather: lists of all processes, joined; called on all of them together. message: for the user;
    None on processes other than the main one, which write nothing.
    """

    def __init__(
        self,
        output: Path,
        step: int,
        limits: Limits,
        keys_at: Callable[[int], tuple[str, str]],
        gather: Callable[[list[Any]], list[Any]],
        message: Callable[[str], None] | None,
    ) -> None:
        self._output, self._limits, self._keys_at = output, limits, keys_at
        self._gather, self._message = gather, message
        self._in_a_row = 0
        self._skipped = Lines(output / SKIPPED, step=step) if message else None
        self._nonfinite = Lines(output / NONFINITE, step=step) if message else None
        # with its shard: two data sets may have a sample of the same key
        lines = self._skipped.read() if self._skipped else ()
        listed = [(line["key"], line["shard"]) for line in lines]
        self._bad = set(gather(listed))  # all processes must stop together

    def check(self, step_facts: StepFacts) -> bool:
        """Returns whether to stop, since a process received a signal. Raises TrainingError if too
        many samples are bad, or too many updates in a row were skipped.
        """
        valid, stopped, skipped = step_facts.numbers.tolist()
        if valid < self._limits.batch:
            self._leave_out(step_facts)
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if skipped:
            self._skip_update(step_facts)
        return bool(stopped)

    def _leave_out(self, step_facts: StepFacts) -> None:
        step, bad = step_facts.step, self._gather(list(step_facts.bad))
        lines = [
            {"step": step, "key": key, "shard": shard, "reason": reason}
            for key, shard, reason in sorted(bad)
        ]
        if self._skipped and self._message:
            self._skipped.add(lines)
            for line in lines:
                if (line["key"], line["shard"]) not in self._bad:
                    self._message(
                        f"step {step:,} leaves out sample {line['key']} of {line['shard']}: "
                        f"{line['reason']}"
                    )
        self._bad |= {(line["key"], line["shard"]) for line in lines}
        limits = self._limits
        if len(self._bad) > limits.bad_share * limits.samples:
            raise TrainingError(
                f"{len(self._bad):,} of {limits.samples:,} samples can't be trained on, more than "
                f"max_bad_share={limits.bad_share:g} allows. {self._output / SKIPPED} lists them "
                "with their reasons. Repair the data set, or raise max_bad_share; the same command "
                "continues from the last checkpoint."
            )

    def _skip_update(self, step_facts: StepFacts) -> None:
        step, first = step_facts.step, step_facts.position
        positions = range(first, first + self._limits.batch)
        pairs = [self._keys_at(position) for position in positions]
        if self._nonfinite and self._message:
            keys, references = map(list, zip(*pairs, strict=True))
            line = {"step": step, "keys": keys}
            self._nonfinite.add([line if references == keys else line | {"references": references}])
            used = [*dict.fromkeys(key for pair in pairs for key in pair)]
            self._message(
                f"step {step:,}: loss or gradient is not finite, and the update is skipped. "
                f"Its samples: {_listed(used)}"
            )
        limit = self._limits.nonfinite_steps
        if self._in_a_row >= limit:
            raise TrainingError(
                f"the updates of {self._in_a_row} steps in a row were skipped, up to step "
                f"{step:,}, since loss or gradient was not finite (max_nonfinite_steps="
                f"{limit}). {self._output / NONFINITE} lists the steps and their samples. The last "
                "checkpoint is intact. Lower optim.learning_rate, or set mixed_precision to bf16 "
                "or no."
            )


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + more
