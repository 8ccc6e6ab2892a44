"""Progress: shows the progress of a command."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from stages.storage.manifest import Manifest

Item = TypeVar("Item")
Unit = Literal["images", "shards", "bytes", "people", "portraits"]


class Progress:
    """A context that shows progress: on a terminal a bar with rate and ETA, elsewhere a line every
    few seconds; both with the most frequent reasons of dropped and failed inputs.

    total: in `unit`.
    """

    def __init__(self, total: int, unit: Unit = "images") -> None:
        console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[rate]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[reasons]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._prints_lines = not console.is_terminal
        self._unit, self._total, self._done = unit, total, 0
        self._task = self._bar.add_task(unit, total=total, count=self._count(), rate="", reasons="")
        self._started, self._last_line = 0.0, time.time()
        self._reason_counts: Counter[str] = Counter()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, count: int) -> None:
        """Adds `count` processed units."""
        now = time.time()
        # time is measured from the first ones on, when models are loaded
        self._started = self._started or now
        self._done += count
        rate = self._done / max(now - self._started, 1e-9) if now - self._started > 1 else 0.0
        shown = self._speed(rate) if rate else ""
        self._bar.update(self._task, advance=count, count=self._count(), rate=shown)
        if self._prints_lines and now - self._last_line > 5:
            self._last_line = now
            left = f", {(self._total - self._done) / rate:.0f} s left" if rate else ""
            unit = "" if self._unit == "bytes" else f" {self._unit}"
            typer.echo(
                f"  {self._count()}{unit}, {self._speed(rate)}{left}{self._reasons()}",
                err=True,
            )

    def advanced(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items, each of which is a unit."""
        for item in items:
            self.advance(1)
            yield item

    def note(self, manifest: Manifest) -> None:
        """Adds the dropped and failed inputs of a committed shard, by reason."""
        self._reason_counts.update(manifest.dropped)
        self._reason_counts.update(manifest.failed)
        self._bar.update(self._task, reasons=self._reasons())

    def _count(self) -> str:
        if self._unit == "bytes":
            return f"{self._done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB"
        return f"{self._done:,}/{self._total:,}"

    def _speed(self, rate: float) -> str:
        return f"{rate / 1e6:,.1f} MB/s" if self._unit == "bytes" else f"{rate:.1f}/s"

    def _reasons(self) -> str:
        return "".join(
            f"  {reason} {count}" for reason, count in self._reason_counts.most_common(4)
        )
