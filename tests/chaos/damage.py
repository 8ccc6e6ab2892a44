"""Damages files of committed shards while no run is active."""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.lint import lint
from stages.storage.store import Store
from tests.chaos.command import output_of

_REPAIRED = 3  # files of shards that are damaged at once


@dataclass
class Vandal:
    """Damages a random file after each kill of the driver. done: number of damages by kind."""

    rng: random.Random
    done: Counter[str] = field(default_factory=Counter)
    _shards: int = 0  # committed at the last time

    def is_due(self, output: Path) -> bool:
        """Returns whether there are more committed shards than at the last time."""
        return len(_manifests(output)) > self._shards

    def strike(self, output: Path, arguments: list[str]) -> list[str]:
        """Damages a file of a committed shard, if there is one, runs the command with `arguments`,
        and restores the file from a copy. Returns faults: damage that isn't reported.
        """
        manifests = _manifests(output)
        self._shards = len(manifests)
        if not manifests:
            return []
        path = self.rng.choice(sorted((output / "shards").glob(f"{self.rng.choice(manifests)}.*")))
        whole = path.read_bytes()
        kind = self._damage(path)
        faults = self._unreported(path, kind, output, arguments)
        path.write_bytes(whole)
        return faults

    def finish(self, output: Path, arguments: list[str]) -> list[str]:
        """Damages several files of the complete data set, and repairs them with one command.
        Returns a fault if that fails.
        """
        for path in self.rng.sample(sorted((output / "shards").iterdir()), _REPAIRED):
            self._damage(path)
        table = self.rng.choice(sorted(output.glob("*.parquet")))
        os.truncate(table, self.rng.randrange(table.stat().st_size))
        code, text = output_of([*arguments, "--repair"])
        return [f"the repair exited {code}: {text[-600:]}"] if code else []

    def _damage(self, path: Path) -> str:
        """Damages a file. Returns how."""
        kind, whole = self.rng.choice(("removed", "truncated", "changed")), path.read_bytes()
        if kind == "removed":
            path.unlink()
        elif kind == "truncated":
            os.truncate(path, self.rng.randrange(len(whole)))
        else:
            start = self.rng.randrange(len(whole))
            part = bytes(255 - byte for byte in whole[start : start + 8])
            path.write_bytes(whole[:start] + part + whole[start + 8 :])
        self.done[f"{path.suffix[1:]} {kind}"] += 1
        return kind

    def _unreported(self, path: Path, kind: str, output: Path, arguments: list[str]) -> list[str]:
        if not [line for line in lint(Store(str(output))) if path.name in line]:
            return [f"lint doesn't find that {path.name} was {kind}"]
        if kind == "changed" or (path.suffix == ".json" and kind == "removed"):
            return []  # the run doesn't read it, or makes the shard again
        code, text = output_of(arguments)
        if code == 2 and path.name in text and "Traceback" not in text:
            return []
        return [f"{path.name} was {kind}, and the run exited {code}: {text[-600:]}"]


def _manifests(output: Path) -> list[str]:
    """Returns the names of the committed shards."""
    return sorted(path.stem for path in (output / "shards").glob("fgid-*.json"))
