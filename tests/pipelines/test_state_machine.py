"""Whatever is done to a data set, in any order and killed at any moment, its output equals that of
a fresh run. `incremental` states what is promised.

CI runs the same histories each time, and prints one that fails as a program. With the environment
variable STATE_MACHINE_EXAMPLES=1000 that many others are tried, and one that fails is shortened.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.pipelines.incremental import IncrementalDataSet
from tests.pipelines.stub_chain import Picture

SEARCHED: Final = int(os.environ.get("STATE_MACHINE_EXAMPLES", "0"))

INPUTS: Final = [f"photo-{letter}.jpg" for letter in "abcdefghijkl"]
PICTURES: Final = {
    "ann": Picture(person="ann"),
    "ann saved again": Picture(person="ann", saved=1),
    "ann blurred": Picture(person="ann", saved=2, sharpness=0.2),
    "ann cropped": Picture(person="ann", cropped=True, sharpness=0.4),
    "ann, another shot": Picture(person="ann", shot=2, sharpness=0.3),
    "ann's twin": Picture(person="twin"),
    "bob blurred": Picture(person="bob", sharpness=0.2),
    "bob saved again": Picture(person="bob", saved=1),
    "cat": Picture(person="cat", sharpness=0.4),
    "nobody": Picture(person=""),
}
REASONS: Final = (
    "caption_failed",
    "blurred",
    "near_duplicate",
    "duplicate",
    "no_face",
    "not_a_file",
    "taken_down",
)
CHANGES: Final[list[dict[str, Any]]] = [
    {"min_sharpness": 0.0},
    {"min_sharpness": 0.25},
    {"min_sharpness": 0.45},
    {"prompt": "A"},
    {"prompt": "B"},
    {"min_score": 0.5},
    {"min_score": 0.6},
    {"jpeg_quality": 95},
    {"jpeg_quality": 90},
    {"max_hash_distance": 10},
    {"max_hash_distance": -1},
]


def bytes_of(picture: str) -> bytes:
    return PICTURES[picture].encode() if picture in PICTURES else picture.encode()


names = st.sampled_from(INPUTS)
pictures = st.sampled_from([*PICTURES, "not a picture"])
contents = st.dictionaries(names, pictures, min_size=1, max_size=4)


class Machine(RuleBasedStateMachine):
    """Each rule is something that a user does."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="state-machine-"))
        self.data = IncrementalDataSet(self.folder / "data")

    def teardown(self) -> None:
        try:
            if self.data.files or self.data.planned:
                self.data.run()
        finally:
            shutil.rmtree(self.folder)

    @initialize(inputs=st.dictionaries(names, pictures, min_size=1, max_size=8))
    def begin(self, inputs: dict[str, str]) -> None:
        self.put(inputs)

    @rule(inputs=contents)
    def put(self, inputs: dict[str, str]) -> None:
        """New inputs, and other bytes for those that are there."""
        for name, picture in inputs.items():
            self.data.put(name, bytes_of(picture))

    @precondition(lambda self: self.data.files)
    @rule(place=st.integers(0, len(INPUTS) - 1))
    def touch(self, place: int) -> None:
        self.data.touch(self._present(place))

    @precondition(lambda self: self.data.files)
    @rule(place=st.integers(0, len(INPUTS) - 1))
    def remove(self, place: int) -> None:
        self.data.remove(self._present(place))

    def _present(self, place: int) -> str:
        present = sorted(self.data.files)
        return present[place % len(present)]

    @rule(change=st.sampled_from(CHANGES))
    def change(self, change: dict[str, Any]) -> None:
        self.data.change(**change)

    @rule(outage=st.booleans())
    def captioner_is_away(self, outage: bool) -> None:
        self.data.outage = outage

    @precondition(lambda self: self.data.files or self.data.planned)
    @rule()
    def run(self) -> None:
        self.data.run()

    @precondition(lambda self: self.data.planned)
    @rule(reason=st.sampled_from(REASONS))
    def retry(self, reason: str) -> None:
        self.data.run(reason)

    @precondition(lambda self: self.data.files or self.data.planned)
    @rule(moment=st.integers(1, 120))
    def run_and_kill(self, moment: int) -> None:
        self.data.run(kill_at=moment)

    @precondition(lambda self: self.data.planned)
    @rule(name=names)
    def take_down_by_name(self, name: str) -> None:
        self.data.take_down("source", name)

    @precondition(lambda self: self.data.planned)
    @rule(picture=pictures)
    def take_down_by_hash(self, picture: str) -> None:
        self.data.take_down("hash", sha256(bytes_of(picture)).hexdigest())

    @precondition(lambda self: self.data.planned)
    @rule(name=names, moment=st.integers(1, 40))
    def take_down_and_kill(self, name: str, moment: int) -> None:
        self.data.take_down("source", name, moment)


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it wrote: only a machine that loses power does."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_any_history_leads_to_the_output_of_a_fresh_run() -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=SEARCHED or 50,
            stateful_step_count=12,
            deadline=None,
            derandomize=not SEARCHED,
            database=None,
            report_multiple_bugs=False,
            phases=[Phase.generate, *([Phase.shrink] if SEARCHED else [])],
            suppress_health_check=list(HealthCheck),
        ),
    )
