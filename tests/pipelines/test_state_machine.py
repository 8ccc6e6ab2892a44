"""A Hypothesis state machine: after any sequence of changes, runs, kills and take-downs, the output
equals that of a fresh run. `incremental` states the exceptions.

The sequences are the same each time, and one that fails is printed as a program. With the
environment variable STATE_MACHINE_EXAMPLES=1000 that many random ones run, and one that fails is
shortened.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from hashlib import sha256
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

from tests.pipelines import machines
from tests.pipelines.incremental import IncrementalDataSet
from tests.pipelines.stub_chain import Scene

INPUTS: Final = [f"photo-{letter}.jpg" for letter in "abcdefghijkl"]
SCENES: Final = {
    "ann": Scene(person="ann"),
    "ann saved again": Scene(person="ann", saved=1),
    "ann blurred": Scene(person="ann", saved=2, sharpness=0.2),
    "ann cropped": Scene(person="ann", cropped=True, sharpness=0.4),
    "ann, another shot": Scene(person="ann", shot=2, sharpness=0.3),
    "ann's twin": Scene(person="twin"),
    "bob blurred": Scene(person="bob", sharpness=0.2),
    "bob saved again": Scene(person="bob", saved=1),
    "cat": Scene(person="cat", sharpness=0.4),
    "nobody": Scene(person=""),
}


def bytes_of(scene: str) -> bytes:
    return SCENES[scene].encode() if scene in SCENES else scene.encode()


def chosen(items: Iterable[str], number: int) -> str:
    """Returns one of the sorted items: that with this number, counted round and round."""
    ordered = sorted(items)
    return ordered[number % len(ordered)]


names = st.sampled_from(INPUTS)
scenes = st.sampled_from([*SCENES, "not a scene"])
numbers = st.integers(0, len(INPUTS) - 1)  # for `chosen`
moments = st.just(0) | st.integers(1, 60)  # of a kill; 0: none
runs = st.none() | moments  # the run after a change; None: none
# One setting changes at a time, so that most of the output is reused.
SETTINGS: Final[dict[str, list[Any]]] = {
    "prompt": ["A", "B", "C"],
    "min_sharpness": [0.0, 0.25, 0.45],
    "min_score": [0.5, 0.6],
    "max_hash_distance": [10, -1],
    "jpeg_quality": [95, 90],  # a change of it makes everything again from the source
    "missing": ["stop", "drop"],
}
changes = st.tuples(st.sampled_from([*SETTINGS]), st.integers(1, 2))


class Machine(RuleBasedStateMachine):
    """Each rule is something that a user does."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="state-machine-"))
        self.data = IncrementalDataSet(self.folder / "data")

    def teardown(self) -> None:
        try:
            self.run(0)
        finally:
            shutil.rmtree(self.folder)

    @initialize(inputs=st.dictionaries(names, scenes, min_size=1, max_size=8), run=runs)
    def begin(self, inputs: dict[str, str], run: int | None) -> None:
        self.put(inputs, run)

    @rule(inputs=st.dictionaries(names, scenes, max_size=3), run=runs)
    def put(self, inputs: dict[str, str], run: int | None) -> None:
        """inputs: name → scene; an input that exists gets other bytes."""
        for name, scene in inputs.items():
            self.data.put(name, bytes_of(scene))
        self.run(run)

    @precondition(lambda self: self.data.files)
    @rule(number=numbers, run=runs)
    def touch(self, number: int, run: int | None) -> None:
        self.data.touch(chosen(self.data.files, number))
        self.run(run)

    @precondition(lambda self: self.data.files)
    @rule(number=numbers, run=runs)
    def remove(self, number: int, run: int | None) -> None:
        self.data.remove(chosen(self.data.files, number))
        self.run(run)

    @rule(change=changes, outage=st.booleans(), run=runs)
    def change(self, change: tuple[str, int], outage: bool, run: int | None) -> None:
        """change: a setting, and how far it moves in its list of values. outage: of the captioner,
        until the next change.
        """
        name, steps = change
        values = SETTINGS[name]
        place = values.index(getattr(self.data.settings, name))
        self.data.change(**{name: values[(place + steps) % len(values)]})
        self.data.outage = outage
        self.run(run)

    def run(self, moment: int | None) -> None:
        """Runs the pipeline. moment: of a kill; 0: none. None: no run."""
        if moment is not None and (self.data.planned or self.data.files):
            self.data.run(kill_at=moment)

    @precondition(lambda self: self.data.reasons)
    @rule(number=numbers)
    def retry(self, number: int) -> None:
        """Retries the records of an existing reason; an outage is over."""
        self.data.outage = False
        self.data.run(chosen(self.data.reasons, number))

    @precondition(lambda self: self.data.planned)
    @rule(which=numbers | scenes, moment=st.just(0) | st.integers(1, 20))
    def take_down(self, which: int | str, moment: int) -> None:
        """Takes down an input by its name, or a scene by its digest."""
        if isinstance(which, int):
            self.data.take_down("source", chosen(self.data.planned, which), moment)
        else:
            self.data.take_down("hash", sha256(bytes_of(which)).hexdigest(), moment)


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips fsync, for speed: SIGKILL loses no written data, only a power failure does."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.parametrize("number", machines.numbers(30))
def test_any_sequence_ends_with_the_output_of_a_fresh_run(number: int) -> None:
    machines.search(Machine, number)
