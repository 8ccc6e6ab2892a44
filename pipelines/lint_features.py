"""Lint of features: they must be of samples that the data set has.

`make features` stores what encoders answer of each sample. When a shard is replaced, its features
are removed (stages/storage/commit.py). This finds those that are there nevertheless: they were put
back from a copy, say, or are in files that a killed run left.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping, Set
from typing import Final

from configs.errors import ShardError
from stages.storage import layout
from stages.storage.manifest import Manifest
from stages.storage.sidecar import SidecarFile
from stages.storage.store import Store

_LISTED: Final = 3  # keys of one file


def lint_features(
    store: Store,
    manifests: Mapping[str, Manifest],
    removed: Set[str],
    samples: Set[str],
    *,
    complete: bool,
    fast: bool,
) -> Iterator[str]:
    """Yields a line for each file of features of other samples than the data set has.

    manifests: of the data set, by shard. removed: keys that were taken down. samples: keys of its
    samples. complete: manifests and samples are all there are; otherwise, what is missing among
    them is no fault here. fast: compare manifests only. Otherwise the keys in all tars and sidecars
    are read too, also in those that aren't committed; the features themselves are not.
    """
    for name in store.tree(layout.FEATURES):
        path = f"{layout.FEATURES}/{name}"
        base = name.rpartition("/")[2]
        try:
            if layout.is_manifest(base):
                yield from _outdated(store, path, manifests, complete)
            elif not fast:
                present = samples if complete else None
                yield from _keys_left(path, _keys(store, path), removed, present)
        except FileNotFoundError:
            continue  # a run that is writing has replaced it
        except ShardError as error:
            yield f"{error} {_delete(path)}"


def _outdated(
    store: Store, path: str, manifests: Mapping[str, Manifest], complete: bool
) -> Iterator[str]:
    """Compares a manifest of features with the data set's of the same shard."""
    features = Manifest.from_json(store.read(path), f"{store.url}/{path}")
    manifest = manifests.get(features.shard)
    digest = None if manifest is None else manifest.tar.sha256
    if digest != features.inputs_digest and (complete or digest):
        yield (
            f"{path}: the features of this shard were made of other samples than the data set has. "
            f"{_delete(path)}"
        )


def _keys_left(
    path: str, keys: Iterator[str], removed: Set[str], samples: Set[str] | None
) -> Iterator[str]:
    """Yields a line if a file of features has keys that were taken down, and one if it has others
    that are no samples.
    """
    taken_down, others = list[str](), list[str]()
    for key in keys:
        if key in removed:
            taken_down.append(key)
        elif samples is not None and key not in samples:
            others.append(key)
    for wrong, why in ((taken_down, "taken down"), (others, "not a sample of the data set")):
        if wrong:
            more = f" and {len(wrong) - _LISTED:,} more" if len(wrong) > _LISTED else ""
            yield (
                f"{path} has features of {', '.join(wrong[:_LISTED])}{more}: {why}. {_delete(path)}"
            )


def _keys(store: Store, path: str) -> Iterator[str]:
    """Yields the keys in a tar or a sidecar. Raises ShardError if it can't be read to its end; what
    a killed writer left may end anywhere.
    """
    base = path.rpartition("/")[2]
    if layout.index_of_sidecar(base) is not None:
        with store.parquet(path) as file:
            yield from SidecarFile(file).read(("key",)).column("key").to_pylist()
    elif ".tar" in base:
        try:
            with store.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    yield member.name.partition(".")[0]
        except (tarfile.TarError, EOFError) as error:
            if layout.is_of_shard(base):
                raise ShardError(f"{path} can't be read to its end: {error}.") from error


def _delete(path: str) -> str:
    """Says what to do about a file of features: its shard is deleted, or a temporary file."""
    folder, _, base = path.rpartition("/")
    files = base if base.startswith(".") else f"{base.partition('.')[0]}.*"
    return f"Delete {folder}/{files}; make features computes what is missing."
