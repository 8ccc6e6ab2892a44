"""Find: one input of a data set, by its key or name, with everything that is recorded of it.

Only the sample's own bytes of a tar are read. A removed record is found by its key, or by the name
that the input had; nothing but its key is kept.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow.compute as pc

from configs.errors import PipelineError
from stages.fields import Column
from stages.record import KEY_LENGTH, Record, key_of
from stages.storage.exclusions import TAKEN_DOWN
from stages.storage.manifest import Manifest
from stages.storage.reader import DatasetReader
from stages.storage.sidecar import STANDARD_COLUMNS, Row, is_quarantined
from stages.storage.store import Store

_MIN_DIGITS: Final = 4  # of a key, in place of all of them
_LISTED: Final = 10  # inputs that a text may mean
_COMPARED: Final = 20_000  # names, for suggestions


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What is recorded of one input.

    row: of the sidecar. tar: file name of the tar that holds it, "" for none. record: its sample,
    if it has one. identity: its row of identities.parquet, if it has one. config: plain values of
    OUT/config.yaml. current: True if the shard was made with that configuration. columns: of the
    sidecar.
    """

    shard: str
    row: Row
    tar: str
    record: Record | None
    identity: Row | None
    config: dict[str, Any]
    current: bool
    columns: Mapping[str, Column]

    @property
    def taken_down(self) -> bool:
        return bool(self.row["reason"] == TAKEN_DOWN)


def inspect(store: Store, text: str) -> Inspection:
    """The input that `text` means: a key, the beginning of a key, or a name. Raises PipelineError
    unless there is exactly one."""
    reader = DatasetReader(store)
    manifests = reader.manifests()
    index, key = find(reader, sorted(manifests), text)
    with reader.sidecar(index) as file:
        columns, table = file.columns, file.read()
    [row] = table.filter(pc.equal(table.column("key"), key)).to_pylist()
    return Inspection(
        shard=manifests[index].shard,
        row=row,
        tar=_tar(manifests[index], row),
        record=reader.sample(index, row),
        identity=_identity(reader, key),
        config=reader.config_values(),
        current=_is_current(reader, manifests[index].signatures),
        columns={**STANDARD_COLUMNS, **columns},
    )


def _tar(manifest: Manifest, row: Row) -> str:
    if is_quarantined(row):
        return manifest.quarantine.name if manifest.quarantine else ""
    return manifest.tar.name if row["tar_offset"] >= 0 else ""


def _is_current(reader: DatasetReader, signatures: Sequence[str]) -> bool:
    """True if the signatures are those of the last run (dataset.json)."""
    last_run = reader.dataset_info().get("signatures", [])
    return list(last_run) == list(signatures)


def find(reader: DatasetReader, shards: Sequence[int], text: str) -> tuple[int, str]:
    """(index of the shard, key) of the one input that `text` means. Raises PipelineError."""
    prefix, by_name = text.lower(), key_of(text)
    for key in (prefix, by_name):
        # Samples are found without reading all sidecars.
        if (identity := _identity(reader, key)) and identity["shard"] in shards:
            return identity["shard"], key
    matches, names = list[tuple[int, Row]](), list[str]()
    is_prefix = len(prefix) >= _MIN_DIGITS and not prefix.strip("0123456789abcdef")
    for index in shards:
        table = reader.rows(index, ("key", "source", "status", "reason"))
        keys, sources = table.column("key"), table.column("source")
        for key in (prefix, by_name):
            if pc.any(pc.equal(keys, key)).as_py():
                return index, key
        is_match = pc.ends_with(sources, f"/{text}")
        if is_prefix:
            is_match = pc.or_(is_match, pc.starts_with(keys, prefix))
        matches += [(index, row) for row in table.filter(is_match).to_pylist()]
        if len(names) < _COMPARED:
            names += sources.to_pylist()
    if len(matches) == 1:
        return matches[0][0], matches[0][1]["key"]
    message = _ambiguous(text, matches) if matches else _not_found(reader.store, text, names)
    raise PipelineError(message)


def _ambiguous(text: str, matches: Sequence[tuple[int, Row]]) -> str:
    lines = [
        f"  {row['key']}  {row['reason'] or row['status']}  {printable(row['source'])}"
        for _, row in matches[:_LISTED]
    ]
    more = f"\n  … and {len(matches) - _LISTED} more" if len(matches) > _LISTED else ""
    listed = "\n".join(lines)
    return f"{text!r} may mean {len(matches)} inputs:\n{listed}{more}\nGive more digits of a key."


def _not_found(store: Store, text: str, names: Sequence[str]) -> str:
    close = [
        printable(name)
        for name in difflib.get_close_matches(text, [name for name in names if name], 3, 0.5)
    ]
    hint = f" The closest names are {', '.join(close)}." if close else ""
    return (
        f"no committed input of {store.url} is {text!r}.{hint} Give a key ({KEY_LENGTH} hex "
        f"digits), at least its first {_MIN_DIGITS} digits, or the input's name relative to its "
        "source."
    )


def _identity(reader: DatasetReader, key: str) -> Row | None:
    """The row of a sample in identities.parquet."""
    table = reader.identities()
    rows: list[Row] = table.filter(pc.equal(table.column("key"), key)).to_pylist()
    return rows[0] if rows else None


def printable(text: str) -> str:
    """Text from outside the program for a terminal: characters that can't be printed are written as
    escapes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
