"""Files of JSON lines that a run appends to, such as OUT/losses.jsonl: the losses of every step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from train.checkpoints import sync
from train.packing import PackedBatch
from train.step import LOSSES

HISTORY: Final = "losses.jsonl"
KEYS: Final = "keys.jsonl"
TIMES: Final = "times.jsonl"
VALIDATIONS: Final = "validation.jsonl"
SHEETS: Final = "validation"  # a folder of pictures


class Lines:
    """A file of JSON lines in which each has a `step`.

    step: the step that the run resumes from, 0 for a new run. Lines of later steps, which will be
    trained again, are removed from the file.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        if path.is_file():
            partial = path.with_name(f".{path.name}.partial")
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(_text(line) for line in read_lines(path) if line["step"] <= step)
            sync(partial)
            partial.replace(path)

    def read(self) -> Iterator[dict[str, Any]]:
        return read_lines(self.path)

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(map(_text, lines))


class History(Lines):
    """The losses of every step."""

    def add_losses(
        self, first_step: int, values: npt.NDArray[np.float32], rates: Sequence[Mapping[str, float]]
    ) -> None:
        """Appends steps from `first_step` on: for each its LOSSES, (n, 3), and its learning rates.
        A loss that isn't a finite number is null.
        """
        self.add(
            {
                "step": first_step + index,
                **{name: exact(value) for name, value in zip(LOSSES, row, strict=True)},
                **own,
            }
            for index, (row, own) in enumerate(zip(values, rates, strict=True))
        )


class KeyLog:
    """The keys of the samples that each step has consumed, in order of positions.

    They are those of the micro-batches that the loader returned, so they can be compared with the
    order. lines: of OUT/keys.jsonl; None on processes other than the main one. gather: lists of
    all processes, joined; called on all of them together.
    """

    def __init__(self, lines: Lines | None, gather: Callable[[list[Any]], list[Any]]) -> None:
        self._lines, self._gather = lines, gather
        self._pending: list[tuple[int, int, tuple[str, ...]]] = []  # step, position, keys

    def add(self, step: int, batches: Iterable[PackedBatch]) -> None:
        """Remembers this process's micro-batches of a step."""
        self._pending.extend((step, batch.position, batch.keys) for batch in batches)

    def write(self) -> None:
        """Writes the steps that were added, on all processes, since the last time."""
        by_step: dict[int, list[str]] = {}
        for step, _, keys in sorted(self._gather(self._pending)):
            by_step.setdefault(step, []).extend(keys)
        self._pending = []
        if self._lines is not None:
            self._lines.add({"step": step, "keys": keys} for step, keys in by_step.items())


def exact(value: np.float32) -> float | None:
    """Returns the shortest decimal number that is `value` as float32; None if it isn't finite."""
    return float(str(value)) if np.isfinite(value) else None


def _text(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the values of a file of JSON lines, up to one that is incomplete; none if there is no
    file.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for text in file:
            try:
                yield json.loads(text)
            except json.JSONDecodeError:
                return


def summarise(history: History, *, samples: int, seconds: float, finished: bool) -> dict[str, Any]:
    """Returns the contents of summary.json.

    samples, seconds: consumed by the run, including the runs that it resumed. The start and the
    end of a loss are its means over the first and the last tenth of the steps.
    """
    count, last = 0, 0
    for line in history.read():
        count, last = count + 1, line["step"]
    tenth = max(1, count // 10)
    start = {name: _Mean() for name in LOSSES}
    end = {name: _Mean() for name in LOSSES}
    for index, line in enumerate(history.read()):
        for name in LOSSES:
            if index < tenth:
                start[name].add(line[name])
            if index >= count - tenth:
                end[name].add(line[name])
    return {
        "finished": finished,
        "steps": last,
        "samples": samples,
        "seconds": round(seconds, 1),
        "samples_per_second": round(samples / seconds, 2) if seconds else 0.0,
        "steps_per_second": round(count / seconds, 2) if seconds else 0.0,
        **{name: {"start": start[name].value, "end": end[name].value} for name in LOSSES},
    }


class _Mean:
    """The mean of the numbers added; 0 without one."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def add(self, value: float | None) -> None:
        if value is not None:
            self._sum, self._count = self._sum + value, self._count + 1

    @property
    def value(self) -> float:
        return round(self._sum / max(1, self._count), 6)
