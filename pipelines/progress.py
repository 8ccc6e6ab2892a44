"""Progress: how far a run is, on a terminal and elsewhere."""

from __future__ import annotations

import time
from collections import Counter

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from stages.storage.manifest import Manifest


class Progress:
    """A bar with images/s and ETA on a terminal, a line every few seconds elsewhere; failures by
    reason on both.
    """

    def __init__(self, total: int) -> None:
        console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[ended]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._plain = not console.is_terminal
        self._task = self._bar.add_task("images", total=total, rate="", ended="")
        self._total, self._done, self._started, self._said = total, 0, 0.0, time.time()
        self._ended: Counter[str] = Counter()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, count: int) -> None:
        now = time.time()
        # the clock starts with the first picture, once models are loaded
        self._started = self._started or now
        self._done += count
        rate = self._done / max(now - self._started, 1e-9) if now - self._started > 1 else 0.0
        self._bar.update(self._task, advance=count, rate=f"{rate:.1f}/s" if rate else "")
        if self._plain and now - self._said > 5:
            self._said = now
            left = f", {(self._total - self._done) / rate:.0f} s left" if rate else ""
            typer.echo(
                f"  {self._done:,}/{self._total:,} images, {rate:.1f}/s{left}{self._reasons()}",
                err=True,
            )

    def note(self, manifest: Manifest) -> None:
        """Count what a committed shard lost, by reason."""
        self._ended.update(manifest.dropped)
        self._ended.update(manifest.failed)
        self._bar.update(self._task, ended=self._reasons())

    def _reasons(self) -> str:
        return "".join(f"  {reason} {count}" for reason, count in self._ended.most_common(4))
