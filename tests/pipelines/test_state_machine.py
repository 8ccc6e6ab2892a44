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


def bytes_of(picture: str) -> bytes:
    return PICTURES[picture].encode() if picture in PICTURES else picture.encode()


names = st.sampled_from(INPUTS)
pictures = st.sampled_from([*PICTURES, "not a picture"])
places = st.lists(st.integers(0, len(INPUTS) - 1), max_size=2, unique=True)
changes = st.fixed_dictionaries(
    {},
    optional={
        "min_sharpness": st.sampled_from([0.0, 0.25, 0.45]),
        "prompt": st.sampled_from("AB"),
        "min_score": st.sampled_from([0.5, 0.6]),
        "jpeg_quality": st.sampled_from([95, 90]),
        "max_hash_distance": st.sampled_from([10, -1]),
    },
)


class Machine(RuleBasedStateMachine):
    """Each rule is something that a user does."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="state-machine-"))
        self.data = IncrementalDataSet(self.folder / "data")

    def teardown(self) -> None:
        try:
            if self.data.planned or self.data.files:
                self.data.run()
        finally:
            shutil.rmtree(self.folder)

    @initialize(inputs=st.dictionaries(names, pictures, min_size=1, max_size=8), settings=changes)
    def begin(self, inputs: dict[str, str], settings: dict[str, Any]) -> None:
        self.edit(inputs, [], [])
        self.data.change(**settings)

    @rule(put=st.dictionaries(names, pictures, max_size=3), touch=places, remove=places)
    def edit(self, put: dict[str, str], touch: list[int], remove: list[int]) -> None:
        """put: new inputs, and other bytes for those that are there. touch, remove: places among
        the inputs that are there.
        """
        for act, chosen in ((self.data.touch, touch), (self.data.remove, remove)):
            present = sorted(self.data.files)
            for place in chosen:
                if place < len(present):
                    act(present[place])
        for name, picture in put.items():
            self.data.put(name, bytes_of(picture))

    @rule(settings=changes, outage=st.booleans())
    def change(self, settings: dict[str, Any], outage: bool) -> None:
        """outage: of the captioner, until the next change."""
        self.data.change(**settings)
        self.data.outage = outage

    @precondition(lambda self: self.data.planned or self.data.files)
    @rule()
    def run(self) -> None:
        self.data.run()

    @precondition(lambda self: self.data.planned)
    @rule(reason=st.sampled_from(REASONS))
    def retry(self, reason: str) -> None:
        self.data.run(reason)

    @precondition(lambda self: self.data.planned or self.data.files)
    @rule(moment=st.integers(1, 120))
    def run_and_kill(self, moment: int) -> None:
        self.data.run(kill_at=moment)

    @precondition(lambda self: self.data.planned)
    @rule(which=names | pictures, moment=st.just(0) | st.integers(1, 40))
    def take_down(self, which: str, moment: int) -> None:
        """By name, or by the digest of a picture; killed at `moment`, unless it is 0."""
        if which in INPUTS:
            self.data.take_down("source", which, moment)
        else:
            self.data.take_down("hash", sha256(bytes_of(which)).hexdigest(), moment)


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips fsync, for speed: SIGKILL loses no written data, only a power failure does."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_any_history_leads_to_the_output_of_a_fresh_run() -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=SEARCHED or 40,
            stateful_step_count=12,
            deadline=None,
            derandomize=not SEARCHED,
            database=None,
            report_multiple_bugs=False,
            phases=[Phase.generate, *([Phase.shrink] if SEARCHED else [])],
            suppress_health_check=list(HealthCheck),
        ),
    )
