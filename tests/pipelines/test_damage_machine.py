"""A Hypothesis state machine: files of a data set are damaged, sources vanish, people are taken
down, commands are killed, in any order. At any time:

- No sample is lost without a cause: its input was changed, its removal was requested, its settings
  say so (`source.missing=drop`), or its own bytes were damaged and its input is gone.
- No shard whose files have the digests of its manifest holds a byte that the stages didn't make.
- After a completed command, nothing of a removed input is left.
- A command ends normally or with one of the project's errors, and a repair succeeds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
)

from configs.errors import PipelineError
from pipelines.dedup.global_pass import stale_shards
from pipelines.lint import lint
from stages.base import run_chain
from stages.record import Record, key_of
from stages.storage.exclusions import removed_keys
from stages.storage.layout import DUPLICATES, IDENTITIES, PLAN, SHARDS, TAKEDOWNS
from stages.storage.reader import DatasetReader
from stages.storage.repair import find_damage
from stages.storage.samples import to_members
from stages.storage.sidecar import Row
from stages.storage.store import Store
from tests.pipelines import incremental, machines
from tests.pipelines.helpers import rows_of
from tests.pipelines.incremental import Settings
from tests.pipelines.losses import File, is_whole
from tests.pipelines.sigkill import killed
from tests.pipelines.stub_chain import OUTAGE, Scene, stub_chain

INPUTS: Final = [f"photo-{letter}.jpg" for letter in "abcdefgh"]
SCENES: Final = [
    Scene(person="ann"),
    Scene(person="ann", saved=1),
    Scene(person="ann", shot=2, sharpness=0.2),
    Scene(person="bob"),
    Scene(person="bob", shot=2, sharpness=0.2),
    Scene(person="cat"),
    Scene(person=""),
]
TABLES: Final = (PLAN, DUPLICATES, IDENTITIES)
moments = st.just(0) | st.integers(1, 60)  # of a kill; 0: none
numbers = st.integers(0, 1000)


class Machine(RuleBasedStateMachine):
    """samples: key → name and source digest of each sample that must not be lost. damaged: names of
    damaged files. at_risk: keys of samples whose own bytes may be damaged.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="damage-machine-"))
        (self.folder / "source").mkdir()
        (self.folder / OUTAGE).write_text("[]")
        self.output = self.folder / "output"
        self.store = Store(str(self.output))
        self.reader = DatasetReader(self.store)
        self.settings, self.used = Settings(min_sharpness=0.3), set[Settings]()
        self.files: dict[str, File] = {}
        self.contents: dict[str, bytes] = {}
        self.samples: dict[str, tuple[str, str]] = {}
        self.damaged: set[str] = set()
        self.at_risk: set[str] = set()
        self.clock = 1_000_000_000

    def teardown(self) -> None:
        try:
            if self.store.exists(PLAN) or self.files:
                self.settings = replace(self.settings, missing="drop")
                self.repair(0)
                self.command(0, incremental.run, self.settings.config(self.folder))
                assert not self.damaged and list(lint(self.store)) == []
        finally:
            shutil.rmtree(self.folder)

    # What users and disks do.

    @initialize(
        scenes=st.dictionaries(st.sampled_from(INPUTS), st.sampled_from(SCENES), min_size=4)
    )
    def begin(self, scenes: dict[str, Scene]) -> None:
        for name, scene in scenes.items():
            self.write(name, scene.encode())
        self.run(0)

    @rule(name=st.sampled_from(INPUTS), scene=st.sampled_from(SCENES))
    def put(self, name: str, scene: Scene) -> None:
        self.write(name, scene.encode())
        self.samples.pop(key_of(name), None)

    @precondition(lambda self: self.files)
    @rule(number=numbers, how=st.sampled_from(["gone", "gone", "zeros"]))
    def lose_source(self, number: int, how: str) -> None:
        name = sorted(self.files)[number % len(self.files)]
        if how == "gone":
            (self.folder / "source" / name).unlink()
            del self.files[name]
        else:
            self.write(name, bytes(len(self.files[name].data)))

    @rule(
        change=st.sampled_from(
            [
                {"prompt": "B"},
                {"min_sharpness": 0.0},
                {"jpeg_quality": 90},
                {"missing": "keep"},
                {"missing": "stop"},
                {"missing": "drop"},
            ]
        )
    )
    def change(self, change: dict[str, Any]) -> None:
        self.settings = replace(self.settings, **change)

    @rule(number=numbers, how=st.sampled_from(["missing", "truncated", "overwritten"]), at=numbers)
    def damage(self, number: int, how: str, at: int) -> None:
        names = [f"{SHARDS}/{name}" for name in self.store.names(SHARDS)]
        names += [name for name in TABLES if self.store.exists(name)]
        sidecar_lost = any(name.startswith(SHARDS) and "parquet" in name for name in self.damaged)
        if PLAN in self.damaged or not names:
            return  # then a sidecar can't be damaged too: together they hold the order of inputs
        name = names[number % len(names)]
        if name == PLAN and sidecar_lost:
            return
        file = self.output / name
        place = 40 if name in TABLES else at * 7919 % max(1, file.stat().st_size - 8)
        self.note_risks(name, how, place)
        if how == "missing":
            file.unlink()
        elif how == "truncated":
            os.truncate(file, file.stat().st_size // 2)
        else:
            whole = file.read_bytes()
            file.write_bytes(whole[:place] + b"\xa5" * 8 + whole[place + 8 :])
        self.damaged.add(name)

    def note_risks(self, name: str, how: str, place: int) -> None:
        """Adds the samples that the damage may have changed."""
        if not name.startswith(SHARDS):
            return
        shard, _, kind = name.removeprefix(f"{SHARDS}/").partition(".")
        others = {n.partition(".")[2] for n in self.damaged if n.startswith(f"{SHARDS}/{shard}.")}
        path = self.output / SHARDS / f"{shard}.parquet"
        if "parquet" in others or not path.exists() or (others and kind == "parquet"):
            self.at_risk |= {*self.samples}  # coarse, for two damaged files of one shard
            return
        rows = incremental.pq.read_table(path).to_pylist()
        column = {"tar": "tar", "quarantine.tar": "quarantine"}.get(kind, "")
        for row in rows:
            start, size = (row[f"{column or 'quarantine'}_{n}"] for n in ("offset", "size"))
            is_touched = how != "overwritten" or start - 8 < place < start + size
            if (column and start >= 0 and is_touched) or (kind == "parquet" and start >= 0):
                self.at_risk.add(row["key"])

    # Commands.

    @rule(moment=moments)
    def run(self, moment: int) -> None:
        self.command(moment, incremental.run, self.settings.config(self.folder))

    @rule(moment=moments)
    def repair(self, moment: int) -> None:
        config = self.settings.config(self.folder)
        done = self.command(moment, incremental.run, config, frozenset(), True)
        if not moment and self.settings.missing == "stop" and not done:
            error = (self.folder / "errors").read_text()
            assert "samples would be lost" in error, error  # of undamaged shards
        elif not moment:
            assert done, "a repair succeeds"
            assert find_damage(self.store) == []
            self.damaged, self.at_risk = set(), set()

    @precondition(lambda self: self.store.exists("config.yaml"))
    @rule(name=st.sampled_from(INPUTS), moment=st.just(0) | st.integers(1, 20))
    def take_down(self, name: str, moment: int) -> None:
        self.command(moment, incremental.remove, self.output, "source", name)

    # The guarantees.

    def command(self, moment: int, function: Callable[..., object], *arguments: Any) -> bool:
        """Runs a command, and checks the guarantees. Returns whether it completed."""
        self.used.add(self.settings)
        if moment:
            was_killed = killed(moment, self.folder / "errors", attempt, function, *arguments)
            done = not was_killed and (self.folder / "errors").read_text() == ""
        else:
            attempt(function, *arguments, errors=self.folder / "errors")
            done = (self.folder / "errors").read_text() == ""
        self.check(done)
        if done and function is incremental.run and not self.damaged:
            planned = self.store.table(PLAN, ["key"]).column("key").to_pylist()
            assert {*planned} == {row["key"] for row in rows_of(self.output)}
        return done

    def check(self, done: bool) -> None:
        removed = removed_keys(self.store)
        damaged = {each.name for each in find_damage(self.store)}
        intact = [
            index
            for index, manifest in self.reader.manifests(readable_only=True).items()
            if not damaged & {f"{SHARDS}/{file.name}" for file in manifest.files}
            and f"{SHARDS}/{manifest.shard}.json" not in damaged
        ]
        rows: dict[str, Row] = {}
        for index in intact:
            rows |= {row["key"]: row for row in self.reader.rows(index).to_pylist()}
            for record in self.reader.records(index):
                if record.ok or record.quarantined:
                    self.check_sample(record)
        for key in {*self.samples} & removed:
            del self.samples[key]
        for key in [key for key in {*self.samples} & {*rows} if not is_whole(rows[key])]:
            self.check_lost(key, rows[key])
            del self.samples[key]
        for key, row in rows.items():
            if is_whole(row):
                self.samples[key] = row["source"], row["sha256"]
        if done and not damaged and not stale_shards(self.store):
            self.check_removed(removed)

    def check_lost(self, key: str, row: Row) -> None:
        """row: the present one of a former sample."""
        name, digest = self.samples[key]
        file = self.files.get(name)
        is_gone = file is None or hashlib.sha256(file.data).hexdigest() != digest
        excused = is_gone and (key in self.at_risk or self.settings.missing == "drop")
        # the second: its bytes are those of a removed input
        excused |= row["reason"] in ("duplicate", "taken_down")
        assert excused, (name, row["reason"], row["detail"])

    def check_sample(self, record: Record) -> None:
        data = self.contents[record.sha256]
        plain = to_members(replace(record, caption="", face_caption=""), ())
        expected = [sample_of(record.source, data, each, self.folder) for each in self.used]
        assert any(plain == each for each, _ in expected), record.source
        assert record.caption in {"", *(caption for _, caption in expected)}

    def check_removed(self, removed: set[str]) -> None:
        names = {name for name in INPUTS if key_of(name) in removed}
        tables = [self.store.table(n) for n in (DUPLICATES, IDENTITIES) if self.store.exists(n)]
        rows = rows_of(self.output)
        text = json.dumps([rows, [table.to_pylist() for table in tables]], default=repr)
        for path in self.output.rglob("*"):
            if path.is_file() and PLAN not in path.name and TAKEDOWNS not in path.name:
                text += path.read_bytes().decode("latin-1")
        for name in names:
            assert name not in text, f"{name} was taken down"
        assert {row["reason"] for row in rows if row["key"] in removed} <= {"taken_down"}

    def write(self, name: str, data: bytes) -> None:
        self.clock += 1
        self.files[name] = File(data, self.clock)
        self.files[name].write(self.folder / "source" / name)
        self.contents[hashlib.sha256(data).hexdigest()] = data


def attempt(function: Callable[..., object], *arguments: Any, errors: Path | None = None) -> None:
    """Calls a function; writes an error of the project to the file `errors`, or else next to the
    output that the arguments name.
    """
    output = next(
        Path(getattr(each, "output", each)) for each in arguments if hasattr(each, "output") or each
    )
    errors = errors or output.parent / "errors"
    errors.write_text("")
    try:
        function(*arguments)
    except PipelineError as error:
        errors.write_text(f"{type(error).__name__}: {error}")


@lru_cache(maxsize=10_000)
def sample_of(
    source: str, data: bytes, settings: Settings, folder: Path
) -> tuple[dict[str, bytes], str]:
    """Returns what the stages make of an input: (members without captions, caption)."""
    stages = [s for s in stub_chain(settings.config(folder)) if s.name != "quality_filter"]
    digest = hashlib.sha256(data).hexdigest()
    record = Record(key=key_of(source), source=source, image=data, sha256=digest)
    [record] = run_chain(stages, [record])
    return to_members(replace(record, caption="", face_caption=""), ()), record.caption


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips fsync, for speed: SIGKILL loses no written data, only a power failure does."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.parametrize("number", machines.numbers(20))
def test_no_damage_spreads_and_no_sample_is_lost_without_a_cause(number: int) -> None:
    machines.search(Machine, number)
