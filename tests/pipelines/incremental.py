"""A data set that is changed over time, and the fresh run that its output must equal.

`IncrementalDataSet` does to a source folder and an output what users do over months: inputs are
added, changed and removed, settings change, runs are killed, inputs are taken down. After each
completed run, the output is compared with that of one fresh run with the same source, settings and
removal requests (docs/adr/0004, 0007, 0009 to 0011). The bytes must be equal, except for the
differences that `compare` allows. Three things depend on the past, so the fresh run gets them as
inputs:

- The shard of an input follows from the order in which inputs were added. So the fresh run starts
  with a plan that the planner alone has made, in an output of its own, of the same new inputs in
  the same order.
- An input that has vanished from the source keeps its sample. So the fresh run plans without this
  input, and then reads the bytes that its record was made from; none if the record says
  `not_a_file`. A run that needs the input itself, since its shard is processed from the source
  again or since it is retried, stops before it writes. With `missing=drop`, each vanished input is
  `not_a_file`.
- A record whose captioning failed is unchanged until it is retried or its caption is stale. So the
  fresh run's captioner fails for the same records. Without an outage no others may fail.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import SourceError
from configs.load import load_text
from configs.schema import DatasetConfig
from pipelines.ledger import read_ledger
from pipelines.lint import lint
from pipelines.planning.missing import Loss
from pipelines.planning.plan import Plan, make_plan, write_plan
from pipelines.run import execute, plan_job
from pipelines.takedown import by_hash, by_source, finish, is_unfinished, take_down
from stages.record import key_of
from stages.storage.commit import complete_killed_commits
from stages.storage.exclusions import TAKEN_DOWN, read_takedowns, removed_keys
from stages.storage.layout import CONFIG, DUPLICATES, IDENTITIES, PLAN, TAKEDOWNS
from stages.storage.reader import DatasetReader
from stages.storage.sidecar import Row
from stages.storage.store import Store
from tests.pipelines.compare import compare
from tests.pipelines.helpers import NO_RULES, config, rows_of
from tests.pipelines.losses import File, is_whole, losses, plan_rows, resize_signature
from tests.pipelines.sigkill import killed
from tests.pipelines.stub_chain import OUTAGE, stub_chain

SHARD_SIZE: Final = 3


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user changes between two runs."""

    min_sharpness: float = 0.0
    prompt: str = "A"
    min_score: float = 0.5
    jpeg_quality: int = 95  # of the resize stage: with another one all starts from the source again
    max_hash_distance: int = 10
    missing: str = "stop"
    person_folder: bool = False

    @lru_cache(maxsize=1000)  # noqa: B019 - a few settings and folders
    def config(self, folder: Path) -> DatasetConfig:
        """Returns the configuration for `folder`/source and `folder`/output."""
        return config(
            folder / "source",
            folder / "output",
            *NO_RULES,
            f"shard_size={SHARD_SIZE}",
            f"rules.min_sharpness={self.min_sharpness}",
            f"caption.llava.prompt={self.prompt}",
            f"detect.min_score={self.min_score}",
            f"resize.jpeg_quality={self.jpeg_quality}",
            f"global_pass.max_hash_distance={self.max_hash_distance}",
            "global_pass.val_share=0.5",
            f"source.missing={self.missing}",
            f"source.person_folder={self.person_folder}".lower(),
        )


@dataclass
class IncrementalDataSet:
    """files: in the source. planned: each input as it was last listed, in the plan's order. outage:
    the captioner fails for about every second input.
    """

    folder: Path
    settings: Settings = field(default_factory=Settings)
    files: dict[str, File] = field(default_factory=dict)
    planned: dict[str, File] = field(default_factory=dict)
    outage: bool = False
    _shards: list[list[str]] = field(default_factory=list)  # inputs
    _plan: list[Row] = field(default_factory=list)
    _contents: dict[str, bytes] = field(default_factory=dict)  # by sha256: all there ever were
    _clock: int = 1_000_000_000  # seconds

    def __post_init__(self) -> None:
        self.source.mkdir(parents=True)
        self.store = Store(str(self.output))
        self.reader = DatasetReader(self.store)
        self._read()

    @property
    def source(self) -> Path:
        return self.folder / "source"

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def config(self) -> DatasetConfig:
        return self.settings.config(self.folder)

    # Actions of a user.

    def put(self, name: str, data: bytes) -> None:
        """Adds an input, or replaces its bytes."""
        self._clock += 1
        self.files[name] = File(data, self._clock)
        self.files[name].write(self.source / name)
        self._contents[sha256(data).hexdigest()] = data

    def touch(self, name: str) -> None:
        """Changes the time of an input, not its bytes."""
        self.put(name, self.files[name].data)

    def remove(self, name: str) -> None:
        (self.source / name).unlink()
        del self.files[name]

    def change(self, **settings: Any) -> None:
        """Changes settings of the next run."""
        self.settings = replace(self.settings, **settings)

    def run(self, *retry: str, kill_at: int = 0) -> bool:
        """Runs the pipeline, and checks the output if the run completed. Returns whether it did.

        kill_at: the moment at which the run is killed (see `sigkill`); 0: never. retry: reasons. A
        run that would lose samples must stop; then it runs with `missing=drop`.
        """
        if self.settings.missing == "stop" and (
            lost := losses(self.output, self.files, resize_signature(self.config), retry)
        ):
            with pytest.raises(SourceError, match="samples would be lost"):
                run(self.config, frozenset(retry))
            self._read()
            assert lost <= {row["key"] for row in self._rows if is_whole(row)}
            self.change(missing="drop")
        whole, failed = self._whole_samples(retry), self.keys("caption_failed")
        keys = sorted(map(key_of, {*self.files, *self.planned}))
        failing = [key for key in keys if self.outage and int(key[0], 16) % 2]
        (self.folder / OUTAGE).write_text(json.dumps(failing))
        complete = self._call(kill_at, run, self.config, frozenset(retry))
        self._check_plan(complete)
        self._check_vanished(whole)
        if not complete:
            return False
        if not self.outage:
            again = "caption_failed" in retry
            assert self.keys("caption_failed") <= (frozenset() if again else failed)
        self.check()
        return True

    def take_down(self, by: str, value: str, kill_at: int = 0) -> None:
        """by: `source` or `hash`. value: a name or a sha256. Without a configuration in the output,
        it does nothing.
        """
        if not self.store.exists(CONFIG):
            return
        whole, log = self._whole_samples(), read_takedowns(self.store)
        complete = self._call(kill_at, remove, self.output, by, value)
        self._check_vanished(whole)
        if complete and read_takedowns(self.store) != log:  # else nothing matched
            self._check_removed()
            # an earlier run may have been killed, which the next one completes
            assert [x for x in lint(self.store) if "it makes the shard" not in x] == []

    # The present state.

    def row(self, name: str) -> Row:
        """Returns an input's row of its sidecar."""
        [row] = [row for row in self._rows if row["key"] == key_of(name)]
        return row

    @property
    def reasons(self) -> list[str]:
        """The reasons of dropped and failed records, sorted."""
        return sorted({row["reason"] for row in self._rows} - {""})

    def keys(self, reason: str) -> frozenset[str]:
        """Returns the keys of the records that were dropped or failed with this reason."""
        return frozenset(row["key"] for row in self._rows if row["reason"] == reason)

    # The guarantees.

    def check(self) -> None:
        """Checks all guarantees. Call it after a completed run."""
        self._check_second_run()
        assert list(lint(self.store)) == []
        ledger = read_ledger(self.store)  # raises where a shard's doesn't balance
        assert ledger.inputs == len(self.planned)
        assert [row["key"] for row in self._rows] == [*map(key_of, self.planned)]
        self._check_removed()
        traces = [path.name for path in self.output.rglob("*") if ".tmp-" in path.name]
        samples = (".fgid", f".{DUPLICATES}", f".{IDENTITIES}")
        assert not [name for name in traces if name.startswith(samples)], "left by a killed run"
        fresh = self.folder / "fresh"
        compare(self.store, self._run_fresh(fresh), self.folder, fresh)

    def _check_second_run(self) -> None:
        before = _stamps(self.output)
        job = plan_job(self.config, chain=stub_chain)
        assert (job.tasks, job.plan.new, job.plan.changed) == ([], 0, 0)
        assert list(execute(job, _ignore)) == []
        assert _stamps(self.output) == before, "a second run writes nothing"

    def _check_removed(self) -> None:
        """Checks that of removed inputs only the keys are left in any file, except the plan, which
        lists the source.
        """
        entries = read_takedowns(self.store)
        keys = {key for entry in entries for part in entry["removed"].values() for key in part}
        digests = {digest for entry in entries for digest in entry["sha256"]}
        names = {name for name in self.planned if key_of(name) in keys}
        assert {row["reason"] for row in self._rows if row["key"] in keys} <= {TAKEN_DOWN}
        tables = [self.store.table(n) for n in (DUPLICATES, IDENTITIES) if self.store.exists(n)]
        text = json.dumps([self._rows, [table.to_pylist() for table in tables]], default=repr)
        for path in self.output.rglob("*"):
            if path.is_file() and PLAN not in path.name and TAKEDOWNS not in path.name:
                text += path.read_bytes().decode("latin-1")
        for trace in names | digests:
            assert trace not in text, f"{trace} was taken down"

    def _whole_samples(self, retry: Sequence[str] = ()) -> dict[str, str]:
        """Returns key → sha256 of the input, for each sample and quarantined sample whose input has
        vanished, in shards that aren't processed from the source again; {} if those are dropped.
        """
        if self.settings.missing == "drop":
            return {}
        resize = resize_signature(self.config)
        current = {
            row["key"]
            for index, manifest in self.reader.manifests().items()
            if resize in manifest.signatures
            for row in self.reader.rows(index, ["key"]).to_pylist()
        }
        return {
            row["key"]: row["sha256"]
            for row in self._rows
            if row["key"] in current
            and is_whole(row)
            and row["source"] not in self.files
            and row["reason"] not in retry
        }

    def _check_vanished(self, before: Mapping[str, str]) -> None:
        for row in self._rows:
            if row["key"] in before and row["reason"] != TAKEN_DOWN:
                same = is_whole(row) and row["sha256"] == before[row["key"]]
                assert same, f"{row['source']} has vanished, and keeps its sample"

    def _check_plan(self, complete: bool) -> None:
        """Checks and stores the plan of a run: a known input keeps its shard; new ones are sorted
        and divided into shards after the others. A removed input that isn't listed has no name. A
        killed run may not have written its plan.
        """
        new = sorted({*self.files} - {*self.planned})
        added = [new[place : place + SHARD_SIZE] for place in range(0, len(new), SHARD_SIZE)]
        shards = [*self._shards, *added]
        inputs = {**self.planned, **self.files}
        planned = {name: inputs[name] for shard in shards for name in shard}
        removed = removed_keys(self.store)
        nameless = {name for name in planned if key_of(name) in removed} - {*self.files}
        rows = self._plan_rows()
        if rows == plan_rows(shards, planned, nameless):
            self.planned, self._shards, self._plan = planned, shards, rows
            self._plan_fresh(new)
        else:
            assert not complete and rows == self._plan

    def _plan_rows(self) -> list[Row]:
        names = ["shard", "source", "size", "version"]
        return self.store.table(PLAN, names).to_pylist() if self.store.exists(PLAN) else []

    # The fresh run.

    def _plan_fresh(self, new: Sequence[str]) -> None:
        """Gives new inputs to the planner alone."""
        folder = self.folder / "planner"
        shutil.rmtree(folder / "source", ignore_errors=True)
        (folder / "source").mkdir(parents=True)
        for name in new:
            self.planned[name].write(folder / "source" / name)
        if new:
            store = Store(str(folder / "output"))
            write_plan(make_plan(self.settings.config(folder), store), store)

    def _run_fresh(self, folder: Path) -> Store:
        """Runs once with the current settings in another folder. Returns the output."""
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "source").mkdir(parents=True)
        store = Store(str(folder / "output"))
        store.write(PLAN, (self.folder / "planner" / "output" / PLAN).read_bytes())
        if self.store.exists(TAKEDOWNS):
            store.write(TAKEDOWNS, self.store.read(TAKEDOWNS))
        for name, file in self.files.items():
            file.write(folder / "source" / name)
        job = plan_job(self.settings.config(folder), chain=stub_chain)
        restored = set()
        for name in {*self.planned} - {*self.files}:
            if (data := self._made_of(name)) is not None:
                File(data, self._clock).write(folder / "source" / name)
                restored.add(name)
        (folder / OUTAGE).write_text(json.dumps(sorted(self.keys("caption_failed"))))
        list(execute(replace(job, plan=_without_vanished(job.plan, restored)), _ignore))
        return store

    def _made_of(self, name: str) -> bytes | None:
        """Returns the bytes from which a vanished input's record was made; None: from none."""
        row = self.row(name)
        if row["sha256"]:
            return self._contents[row["sha256"]]
        taken = [digest for entry in read_takedowns(self.store) for digest in entry["sha256"]]
        return self._contents[taken[0]] if row["reason"] == TAKEN_DOWN and taken else None

    def _call(self, kill_at: int, *call: Any) -> bool:
        """Calls a function. Returns False if it was killed."""
        try:
            if kill_at:
                return not killed(kill_at, self.folder / "errors", *call)
            call[0](*call[1:])
            return True
        finally:
            self._read()

    def _read(self) -> None:
        self._rows = rows_of(self.output)


def run(
    settings: DatasetConfig, retry: frozenset[str] = frozenset(), repair: bool = False
) -> list[Loss]:
    """Returns what a repair could not make again."""
    job = plan_job(settings, retry, stub_chain, repair=repair)
    list(execute(job, _ignore))
    return job.lost()


def remove(output: Path, by: str, value: str) -> None:
    """Does what the command does, with the configuration stored in the output."""
    store = Store(str(output))
    complete_killed_commits(store)
    stored = load_text(DatasetConfig, store.read(CONFIG).decode())
    if matches := by_source(store, value) if by == "source" else by_hash(store, value):
        take_down(store, stored, matches, "source" if by == "source" else "hash", "", stub_chain)
    elif is_unfinished(store, stored):
        finish(store, stored, stub_chain)


def _ignore(count: int) -> None:
    """Ignores progress."""


def _without_vanished(plan: Plan, names: Set[str]) -> Plan:
    """Returns the plan with the inputs `names` as not vanished."""
    rows = pq.read_table(plan.file).to_pylist()
    file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the plan
    with pq.ParquetWriter(file, pq.read_schema(plan.file)) as writer:
        for _, shard in itertools.groupby(rows, lambda row: row["shard"]):
            changed = [{**r, "vanished": r["vanished"] and r["source"] not in names} for r in shard]
            writer.write_table(pa.Table.from_pylist(changed, schema=writer.schema))
    return replace(plan, file=file)


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns name → (inode, mtime) of every file at any depth."""
    stats = {str(p.relative_to(folder)): p.stat() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}
