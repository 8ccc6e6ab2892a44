"""Ledger: counts inputs = written + dropped (by reason) + failed (by reason) of a data set."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from configs.errors import ShardError
from stages.storage import layout
from stages.storage.manifest import Manifest
from stages.storage.reader import DatasetReader
from stages.storage.store import Store


@dataclass(slots=True)
class Ledger:
    """Counts of all committed shards."""

    shards: int = 0
    inputs: int = 0
    written: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, manifest: Manifest) -> None:
        """Adds a shard's counts. Raises ShardError if they don't add up to its inputs."""
        dropped, failed = Counter(manifest.dropped), Counter(manifest.failed)
        if manifest.inputs != manifest.written + dropped.total() + failed.total():
            raise ShardError(
                f"{manifest.shard}: {manifest.inputs} inputs in its manifest, but "
                f"{manifest.written} written, {dropped.total()} dropped and {failed.total()} "
                f"failed. {layout.how_to_repair(layout.manifest(manifest.index))}"
            )
        self.shards += 1
        self.inputs += manifest.inputs
        self.written += manifest.written
        self.dropped += dropped
        self.failed += failed

    def lines(self) -> list[str]:
        """Returns the ledger as lines of text."""
        lines = [
            f"{self.inputs:>8,} inputs in {self.shards} shards",
            f"{self.written:>8,} written",
        ]
        for status, reasons in (("dropped", self.dropped), ("failed", self.failed)):
            names = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
            lines.append(f"{reasons.total():>8,} {status}" + (f" ({names})" if names else ""))
        return lines


def read_ledger(store: Store) -> Ledger:
    """Returns the ledger of all committed shards."""
    ledger = Ledger()
    for manifest in DatasetReader(store).manifests().values():
        ledger.add(manifest)
    return ledger
