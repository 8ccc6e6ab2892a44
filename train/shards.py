"""The shards of a data set, local or at an fsspec URL, and any one sample of them by its number.

A shard exists if its manifest does, so gaps in the numbering and half-written tars are nothing
special. The sidecars say where in its tar each sample lies; a sample is one ranged read, a batch's
are fetched together, and no tar is ever unpacked or read from its start.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import fsspec
import numpy as np
import numpy.typing as npt

from configs.errors import ShardError, SourceError
from stages.codec import from_members
from stages.record import Record

_READERS: Final = 16  # manifests and sidecars read at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A committed shard. tar: its path on the file system; sha256: of the tar; written: its
    samples.
    """

    name: str
    tar: str
    sha256: str
    written: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sidecar:
    keys: list[str]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    def of(self, chosen: frozenset[str] | None) -> _Sidecar:
        """The samples with these keys; None: all."""
        if chosen is None:
            return self
        places = [place for place, key in enumerate(self.keys) if key in chosen]
        return _Sidecar(
            keys=[self.keys[place] for place in places],
            offsets=self.offsets[places],
            sizes=self.sizes[places],
        )


class ShardSet:
    """Every sample on one side of a data set's split, numbered in the order of shards and, in a
    shard, of its tar.

    split: train, val or all. Raises SourceError if there is no data set or nothing in it,
    ShardError if a shard contradicts its manifest.
    """

    def __init__(self, data: str, split: str = "all") -> None:
        self.data = data
        fs, root = _file_system(data)
        manifests = _manifests(fs, root, data)
        with ThreadPoolExecutor(_READERS) as pool:
            read = list(pool.map(lambda path: _read_shard(fs, path), manifests))
        chosen = None if split == "all" else _side(fs, root, data, split)
        kept = ((shard, sidecar.of(chosen) if sidecar else None) for shard, sidecar in read)
        found = [
            (shard, sidecar) for shard, sidecar in kept if sidecar is not None and sidecar.keys
        ]
        if not found and chosen is not None and any(sidecar for _, sidecar in read):
            raise SourceError(
                f"{data}: none of its samples is on the side split={split}. Train with "
                "split=all, or make the data set "
                "again with another global_pass.val_share."
            )
        if not found:
            raise SourceError(
                f"{data}: its {len(read)} shards hold no sample; the report under {data}/report "
                "says why pictures were "
                "dropped. Run make dataset on other pictures."
            )
        self.shards: tuple[Shard, ...] = tuple(shard for shard, _ in found)
        self.keys: list[str] = [key for _, sidecar in found for key in sidecar.keys]
        self._shard_of = np.repeat(
            np.arange(len(found)), [len(sidecar.keys) for _, sidecar in found]
        )
        self._offsets = np.concatenate([sidecar.offsets for _, sidecar in found])
        self._sizes = np.concatenate([sidecar.sizes for _, sidecar in found])
        text = "".join(f"{shard.name} {shard.sha256}\n" for shard in self.shards)
        text += "" if chosen is None else "".join(f"{key}\n" for key in self.keys)
        self.digest: Final = hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.keys)

    def records(self, numbers: Sequence[int]) -> list[Record]:
        """The records of those samples, in that order. Raises ShardError for one that can't be
        read.
        """
        # anew: a worker process can't share its parent's connections
        fs, _ = _file_system(self.data)
        shards = [self.shards[self._shard_of[number]] for number in numbers]
        starts = [int(self._offsets[number]) for number in numbers]
        ends = [int(self._offsets[number] + self._sizes[number]) for number in numbers]
        try:
            parts = fs.cat_ranges([shard.tar for shard in shards], starts, ends, on_error="raise")
        except OSError as error:
            raise ShardError(
                f"{self.data}: {error}. The shards must stay where they are while training runs."
            ) from error
        return [
            _record(part, self.keys[number], shard)
            for part, number, shard in zip(parts, numbers, shards, strict=True)
        ]

    def dataset_config(self) -> str:
        """The data set's own configuration, as YAML; "" if it has none."""
        fs, root = _file_system(self.data)
        try:
            return str(fs.cat_file(f"{root}/config.yaml").decode("utf-8"))
        except FileNotFoundError:
            return ""


def _file_system(data: str) -> tuple[Any, str]:
    try:
        fs, root = fsspec.core.url_to_fs(data)
    except (ValueError, ImportError) as error:
        raise SourceError(
            f"data={data!r} can't be opened: {error}. Give the folder or URL of make dataset."
        ) from error
    return fs, str(root).rstrip("/")


def _manifests(fs: Any, root: str, data: str) -> list[str]:
    try:
        names = fs.ls(f"{root}/shards", detail=False, refresh=True)
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise SourceError(f"{data} can't be listed: {error}") from error
    manifests = sorted(str(name) for name in names if str(name).endswith(".json"))
    if not manifests:
        raise SourceError(
            f"{data}: no shards there (looked for {data}/shards/*.json). Run make dataset first, "
            "then give its output "
            "here, as in data=runs/dataset."
        )
    return manifests


def _side(fs: Any, root: str, data: str, split: str) -> frozenset[str]:
    """Keys of the samples on one side of the split. Raises SourceError where the data set has none
    yet.
    """
    path = f"{root}/identities.parquet"
    try:
        table = _table(fs, path, ["key", "split"])
    except FileNotFoundError:
        raise SourceError(
            f"{data}: it has no identities.parquet, so it isn't split yet. Run make dataset "
            "to its end, or train with split=all."
        ) from None
    return frozenset(row["key"] for row in table.to_pylist() if row["split"] == split)


def _read_shard(fs: Any, manifest: str) -> tuple[Shard, _Sidecar | None]:
    """The shard and where its samples lie; None instead if it holds none."""
    folder = manifest.rpartition("/")[0]
    try:
        said = json.loads(fs.cat_file(manifest))
        name, written, files = said["shard"], int(said["written"]), said["files"]
        if not written:
            return Shard(name=name, tar="", sha256="", written=0), None
        tar, size, sha256 = (files["tar"][part] for part in ("name", "bytes", "sha256"))
        shard = Shard(name=name, tar=f"{folder}/{tar}", sha256=sha256, written=written)
        held = fs.size(shard.tar)
        if held != size:
            raise ShardError(
                f"{shard.tar} holds {held:,} bytes, its manifest says {size:,}. {_REBUILD}"
            )
        sidecar = _sidecar(fs, f"{folder}/{files['parquet']['name']}")
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(
            f"{manifest} is not a shard's manifest ({type(error).__name__}: {error}). {_REBUILD}"
        ) from error
    except OSError as error:
        raise ShardError(
            f"{manifest} names a file that can't be read: {error}. {_REBUILD}"
        ) from error
    ends = sidecar.offsets + sidecar.sizes
    if len(sidecar.keys) != written or int(ends.max()) > size:
        raise ShardError(
            f"{manifest} says {written} samples, its sidecar places {len(sidecar.keys)}. {_REBUILD}"
        )
    return shard, sidecar


_REBUILD: Final = "Delete that manifest and run make dataset again: it makes the shard anew."


def _table(fs: Any, path: str, columns: list[str]) -> Any:
    """A parquet file's columns. Not by pq.read_table, whose threads may outlive Python with the
    stream in hand.
    """
    import pyarrow.parquet

    with fs.open(path, "rb") as stream, pyarrow.parquet.ParquetFile(stream) as file:
        return file.read(columns)


def _sidecar(fs: Any, path: str) -> _Sidecar:
    table = _table(fs, path, ["key", "status", "tar_offset", "tar_size"])
    rows = [row for row in table.to_pylist() if row["status"] == "ok"]
    rows.sort(key=lambda row: row["tar_offset"])
    return _Sidecar(
        keys=[row["key"] for row in rows],
        offsets=np.array([row["tar_offset"] for row in rows], np.int64),
        sizes=np.array([row["tar_size"] for row in rows], np.int64),
    )


def _record(part: bytes, key: str, shard: Shard) -> Record:
    try:
        members: dict[str, bytes] = {}
        with tarfile.open(fileobj=io.BytesIO(part), mode="r:") as tar:
            for member in tar:
                owner, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                if owner != key or file is None:
                    raise ValueError(f"{member.name!r} lies there")
                members[extension] = file.read()
        return from_members(members)
    except (tarfile.TarError, KeyError, ValueError) as error:
        raise ShardError(
            f"sample {key} of {shard.tar} can't be read: {error}. {_REBUILD}"
        ) from error
