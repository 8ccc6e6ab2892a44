"""A data set whose files tests damage."""

from __future__ import annotations

import os
from pathlib import Path

from tests.pipelines import incremental
from tests.pipelines.incremental import IncrementalDataSet
from tests.pipelines.stub_chain import Scene

ANN = Scene(person="ann").encode()
ANN_AGAIN = Scene(person="ann", saved=1).encode()
BLURRED = Scene(person="ann", shot=2, sharpness=0.2).encode()
BOB = Scene(person="bob").encode()
CAT = Scene(person="cat").encode()

TAR, QUARANTINE = "shards/fgid-000000.tar", "shards/fgid-000000.quarantine.tar"
SIDECAR, MANIFEST = "shards/fgid-000000.parquet", "shards/fgid-000000.json"
HOW = ["missing", "truncated", "overwritten"]
REPAIR = r"or make it again: python -m pipelines.cli run -c OUT/config.yaml output=OUT --repair"


def make(tmp_path: Path) -> IncrementalDataSet:
    """A data set of two shards; in the first an input is quarantined and one has no face, in the
    second one is a duplicate.
    """
    data = IncrementalDataSet(tmp_path / "data")
    data.change(min_sharpness=0.3)
    scenes = {"a": ANN, "b": BLURRED, "c": Scene(person="").encode(), "d": BOB, "e": ANN_AGAIN}
    for name, scene in scenes.items():
        data.put(f"photo-{name}.jpg", scene)
    data.run()
    return data


def damage(data: IncrementalDataSet, name: str, how: str) -> None:
    file = data.output / name
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    else:
        overwrite(file, 40)  # in the first page of a table


def overwrite(file: Path, place: int) -> None:
    """Replaces eight bytes."""
    whole = file.read_bytes()
    file.write_bytes(whole[:place] + b"\xa5" * 8 + whole[place + 8 :])
    assert file.read_bytes() != whole


def repair(data: IncrementalDataSet) -> None:
    """Repairs, and checks that the output equals that of a fresh run."""
    assert incremental.run(data.config, repair=True) == []
    data.run()


def lose_sources(data: IncrementalDataSet) -> None:
    for name in tuple(data.files):
        data.remove(name)
