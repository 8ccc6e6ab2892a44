"""Which samples a run would lose because their inputs are gone or can't be read any more, and the
rows of the plan.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from configs.schema import DatasetConfig
from stages.storage import layout
from stages.storage.sidecar import Row, is_quarantined
from tests.pipelines.stub_chain import Scene, StubResize, stub_chain


class File(NamedTuple):
    """mtime: in seconds; differs between any two contents of one file."""

    data: bytes
    mtime: int

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.data)
        os.utime(path, (self.mtime, self.mtime))


def losses(output: Path, files: Mapping[str, File], resize: str, retry: Sequence[str]) -> set[str]:
    """Returns the keys of samples whose input a run needs, although it has vanished or is no scene
    any more.

    files: in the source. resize: signature of the resize stage; the shards of another one are made
    from the source again. retry: reasons. A run completes a commit that was killed while its files
    were being moved, so such commits count.
    """
    lost = set()
    folders = [output / name for name in (layout.SHARDS, layout.STAGED)]
    paths = {path.name: path for folder in folders for path in folder.glob("fgid-*")}
    staged = {path.stem for path in folders[1].glob("*.json")}
    for name, path in paths.items():
        if path.parent == folders[1] and name.partition(".")[0] not in staged:
            paths[name] = folders[0] / name  # its commit was killed before it was complete
    for name in [name for name in paths if layout.index_of_sidecar(name) is not None]:
        manifest = paths.get(name.replace(".parquet", ".json"))
        is_made_again = not manifest or resize not in manifest.read_text()
        for row in pq.read_table(paths[name]).to_pylist() if paths[name].exists() else []:
            file = files.get(row["source"])
            is_needed = is_made_again or row["reason"] in retry
            if is_whole(row) and (not _is_scene(file.data) if file else is_needed):
                lost.add(row["key"])
    return lost


def resize_signature(config: DatasetConfig) -> str:
    """Returns the signature of the chain's resize stage."""
    [resize] = [stage for stage in stub_chain(config) if isinstance(stage, StubResize)]
    return resize.signature()


def is_whole(row: Row) -> bool:
    """Returns whether a row has a sample, quarantined or not."""
    return row["status"] == "ok" or is_quarantined(row)


def _is_scene(data: bytes) -> bool:
    try:
        Scene.decode(data)
    except ValueError:
        return False
    return True


def plan_rows(
    shards: Sequence[Sequence[str]], planned: Mapping[str, File], nameless: Set[str]
) -> list[Row]:
    """Returns rows of plan.parquet. nameless: inputs that were removed and are not listed."""
    return [
        {"shard": index, "source": "", "size": -1, "version": ""}
        if name in nameless
        else {
            "shard": index,
            "source": name,
            "size": len(planned[name].data),
            "version": str(planned[name].mtime * 10**9),
        }
        for index, names in enumerate(shards)
        for name in names
    ]
