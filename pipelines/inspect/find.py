"""Inspect: one input of a data set, found by its key or name, with all that is known of it.

Only its own bytes are read of a tar. What was taken down is found by its key or the name it had,
and says that alone.
"""

from __future__ import annotations

import difflib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow.compute as pc
import yaml

from configs.errors import PipelineError, ShardError
from stages.record import KEY_LENGTH, Record, Status, key_of
from stages.storage.commit import (
    FOLDER,
    is_quarantined,
    read_manifests,
    read_sample,
    read_sidecar,
    shard_name,
)
from stages.storage.exclusions import IDENTITIES, TAKEN_DOWN
from stages.storage.sidecar import Row
from stages.storage.store import Store

_LEAST: Final = 4  # digits of a key that may stand for it
_LISTED: Final = 10
_COMPARED: Final = 20_000  # names that a misspelt one is compared with


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """row: of the sidecar. record: what its tar holds, None where it is in none. person: its row of
    identities.parquet. config: plain values of OUT/config.yaml. current: False where the shard was
    made by another configuration than that.
    """

    shard: str
    row: Row
    record: Record | None
    person: Row | None
    config: dict[str, Any]
    current: bool

    @property
    def taken_down(self) -> bool:
        return bool(self.row["reason"] == TAKEN_DOWN)


def inspect(store: Store, text: str) -> Inspection:
    """The input that `text` names: a key, the beginning of one, or a name. Raises PipelineError
    unless there is one.
    """
    manifests = read_manifests(store)
    try:
        index, key = find(store, sorted(manifests), text)
        table = read_sidecar(store, index)
    except FileNotFoundError as error:
        raise ShardError(
            f"{store.url}: a shard has a manifest and no sidecar. Run the pipeline again."
        ) from error
    [row] = table.filter(pc.equal(table.column("key"), key)).to_pylist()
    config = yaml.safe_load(store.read("config.yaml")) if store.exists("config.yaml") else {}
    dataset = json.loads(store.read("dataset.json")) if store.exists("dataset.json") else {}
    return Inspection(
        shard=shard_name(index),
        row=row,
        record=_sample(store, shard_name(index), row),
        person=_person(store, key),
        config=config or {},
        current=dataset.get("signatures", []) == manifests[index]["signatures"],
    )


def find(store: Store, shards: Sequence[int], text: str) -> tuple[int, str]:
    """(shard, key) of the one input that `text` names. Raises PipelineError."""
    wanted, found, names = text.lower(), list[tuple[int, Row]](), list[str]()
    exact = key_of(text)
    for key in (wanted, exact):
        if (person := _person(store, key)) and person["shard"] in shards:
            return person["shard"], key  # no need to look through them all
    begins = len(wanted) >= _LEAST and not wanted.strip("0123456789abcdef")
    for index in shards:
        table = read_sidecar(store, index, ["key", "source", "status", "reason"])
        keys, sources = table.column("key"), table.column("source")
        for key in (wanted, exact):
            if pc.any(pc.equal(keys, key)).as_py():
                return index, key
        hits = pc.ends_with(sources, f"/{text}")
        if begins:
            hits = pc.or_(hits, pc.starts_with(keys, wanted))
        found += [(index, row) for row in table.filter(hits).to_pylist()]
        if len(names) < _COMPARED:
            names += sources.to_pylist()
    if len(found) == 1:
        return found[0][0], found[0][1]["key"]
    raise PipelineError(_several(text, found) if found else _none(store, text, names))


def _several(text: str, found: Sequence[tuple[int, Row]]) -> str:
    lines = [
        f"  {row['key']}  {row['reason'] or row['status']}  {printable(row['source'])}"
        for _, row in found[:_LISTED]
    ]
    more = f"\n  … and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return (
        f"{text!r} may be {len(found)} inputs:\n"
        + "\n".join(lines)
        + more
        + "\nGive more of one's key."
    )


def _none(store: Store, text: str, names: Sequence[str]) -> str:
    close = [
        printable(name)
        for name in difflib.get_close_matches(text, [name for name in names if name], 3, 0.5)
    ]
    hint = f" The closest names are {', '.join(close)}." if close else ""
    return (
        f"no committed input of {store.url} is {text!r}.{hint} Give a key ({KEY_LENGTH} hex "
        f"digits), at least {_LEAST} "
        "digits of its beginning, or a picture's name relative to its source."
    )


def _sample(store: Store, shard: str, row: Row) -> Record | None:
    """What its tar holds of it, by one ranged read."""
    if row["status"] != Status.OK and not is_quarantined(row):
        return None
    kind = "held" if is_quarantined(row) else "tar"
    name = f"{FOLDER}/{shard}.{'held.tar' if is_quarantined(row) else 'tar'}"
    start = row[f"{kind}_offset"]
    try:
        data = store.read(name, start, start + row[f"{kind}_size"])
    except FileNotFoundError as error:
        raise ShardError(
            f"{store.url}: {name} is missing. Run `lint`, and the pipeline again."
        ) from error
    members = [member | {"offset": member["offset"] - start} for member in row["members"]]
    return read_sample(io.BytesIO(data), {**row, "members": members})


def _person(store: Store, key: str) -> Row | None:
    if not store.exists(IDENTITIES):
        return None
    table = store.table(IDENTITIES)
    rows: list[Row] = table.filter(pc.equal(table.column("key"), key)).to_pylist()
    return rows[0] if rows else None


def printable(text: str) -> str:
    """Text from outside for a terminal: what isn't a visible letter or a space is written as an
    escape.
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
