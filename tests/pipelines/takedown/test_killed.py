"""A take-down that is killed at any moment is completed by the same request."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipelines.lint import lint
from pipelines.takedown import by_source, finish, is_unfinished, take_down
from stages.record import key_of
from stages.storage.exclusions import read_takedowns
from stages.storage.store import Store
from tests.pipelines.helpers import rows_of
from tests.pipelines.sigkill import killed
from tests.pipelines.stub_chain import Scene, stub_chain
from tests.pipelines.takedown.helpers import make, settings_of


def remove(folder: Path) -> None:
    """Does what the command does for `--source "ann *"`."""
    store, settings = Store(str(folder / "out")), settings_of(folder)
    if matches := by_source(store, "ann *"):
        take_down(store, settings, matches, "source", "", stub_chain)
    elif is_unfinished(store, settings):
        finish(store, settings, stub_chain)


def test_a_take_down_killed_at_any_moment_is_completed_by_the_same_request(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    make(data, {"ann 1": Scene(person="ann"), "ben 1": Scene(person="ben")})
    moment = stopped = 0
    while True:
        moment += 1
        folder = Path(shutil.copytree(data, tmp_path / str(moment)))
        if not killed(moment, tmp_path / "errors", remove, folder):
            break
        store = Store(str(folder / "out"))
        stopped += is_unfinished(store, settings_of(folder))
        remove(folder)
        assert not is_unfinished(store, settings_of(folder)) and list(lint(store)) == []
        assert len(read_takedowns(store)) == 1
        reasons = {row["key"]: row["reason"] for row in rows_of(folder / "out")}
        assert reasons.get(key_of("ann 1.jpg"), "taken_down") == "taken_down"
    assert stopped > 5, "most moments are after the log was written"
