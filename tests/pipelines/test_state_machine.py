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


def bytes_of(picture: str) -> bytes:
    return PICTURES[picture].encode() if picture in PICTURES else picture.encode()


names = st.sampled_from(INPUTS)
pictures = st.sampled_from([*PICTURES, "not a picture"])
numbers = st.integers(0, len(INPUTS) - 1)  # each chooses one of what is there
places = st.lists(numbers, max_size=2, unique=True)
# One setting at a time, so that most of the output is reused. With another jpeg_quality all is made
# again from the source.
changes = st.sampled_from(
    [
        *(("min_sharpness", limit) for limit in (0.0, 0.25, 0.45)),
        *(("prompt", letter) for letter in "ABC"),
        *(("min_score", limit) for limit in (0.5, 0.6)),
        *(("max_hash_distance", distance) for distance in (10, -1)),
        ("jpeg_quality", 90),
    ]
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

    @initialize(inputs=st.dictionaries(names, pictures, min_size=1, max_size=8), setting=changes)
    def begin(self, inputs: dict[str, str], setting: tuple[str, Any]) -> None:
        self.edit(inputs, [], [])
        self.change(setting, outage=False)

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

    @rule(setting=changes, outage=st.booleans())
    def change(self, setting: tuple[str, Any], outage: bool) -> None:
        """outage: of the captioner, until the next change."""
        self.data.change(**dict([setting]))
        self.data.outage = outage

    @precondition(lambda self: self.data.planned or self.data.files)
    @rule()
    def run(self) -> None:
        self.data.run()

    @precondition(lambda self: self.data.reasons)
    @rule(number=numbers, outage=st.booleans())
    def retry(self, number: int, outage: bool) -> None:
        """Retries the records of a reason that there is."""
        self.data.outage = outage
        self.data.run(self.data.reasons[number % len(self.data.reasons)])

    @precondition(lambda self: self.data.planned or self.data.files)
    @rule(moment=st.integers(1, 30) | st.integers(1, 120))
    def run_and_kill(self, moment: int) -> None:
        self.data.run(kill_at=moment)

    @precondition(lambda self: self.data.planned)
    @rule(which=numbers | pictures, moment=st.just(0) | st.integers(1, 40))
    def take_down(self, which: int | str, moment: int) -> None:
        """Of an input by its name, or of a picture by its digest; killed at `moment`, unless it is
        0.
        """
        if isinstance(which, int):
            planned = sorted(self.data.planned)
            self.data.take_down("source", planned[which % len(planned)], moment)
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
