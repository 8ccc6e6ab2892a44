"""The held-out people of a data set, with their samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import ConfigError, ShardError
from infer.evaluation.intervals import named_seed
from stages.record import Record, Status
from stages.storage.reader import DatasetReader

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Person:
    """An identity of a data set.

    name: its identity_id. records: its samples, ordered by the names of their sources.
    """

    name: str
    records: tuple[Record, ...]

    @property
    def reference(self) -> Record:
        """The sample from which the identity is read."""
        return self.records[0]

    @property
    def another(self) -> Record | None:
        """Another sample of the person; None if there is only one."""
        return self.records[1] if len(self.records) > 1 else None


def held_out_people(
    reader: DatasetReader,
    count: int,
    *,
    seed: int,
    split: Literal["val", "train", "all"] = "val",
    samples: int = 1,
) -> list[Person]:
    """Returns `count` people of a data set, chosen by the seed.

    The first n of them don't depend on `count`; 0: all. split: the side of the train/val split;
    all: both. samples: how many a person must have. Raises ConfigError if there are too few such
    people, ShardError if a sample can't be read.
    """
    keys: dict[str, dict[str, int]] = {}
    columns = ["key", "shard", "identity_id", "split"]
    for row in reader.identities(columns).to_pylist():
        if split in ("all", row["split"]):
            keys.setdefault(row["identity_id"], {})[row["key"]] = row["shard"]
    enough = [name for name, shards in keys.items() if len(shards) >= samples]
    count = count or len(enough)
    if count < 1 or len(enough) < count:
        side = "" if split == "all" else f" on the side {split!r} of the split"
        raise ConfigError(
            f"{count} people with at least {samples} samples were asked for, but {reader} has "
            f"{len(enough)}{side} (of {len(keys)} people there in all). Ask for 1 to "
            f"{len(enough)}, or make a larger data set: its global pass writes identities.parquet "
            "and the split."
        )
    chosen = sorted(enough, key=lambda name: named_seed(seed, "people", name))[:count]
    records = _records(reader, {key: shard for name in chosen for key, shard in keys[name].items()})
    return [
        Person(
            name=name,
            records=tuple(
                sorted((records[key] for key in keys[name]), key=lambda record: record.source)
            ),
        )
        for name in chosen
    ]


def of_another(names: Sequence[str]) -> dict[str, str]:
    """Returns for each of the names another one: the next in the sequence.

    Raises ConfigError for fewer than two names.
    """
    if len(set(names)) < 2:
        raise ConfigError(f"{len(set(names))} people are given, expected at least 2 to exchange")
    return dict(zip(names, [*names[1:], names[0]], strict=True))


def by_person(people: Iterable[Person], values: Iterable[Value]) -> dict[str, Value]:
    """Returns the people's names with a value for each, in order."""
    return {person.name: value for person, value in zip(people, values, strict=True)}


def _records(reader: DatasetReader, shards: Mapping[str, int]) -> dict[str, Record]:
    """Reads the samples with these keys, each in its shard."""
    records = {}
    for shard in sorted(set(shards.values())):
        keys = [key for key, own in shards.items() if own == shard]
        for row in _rows(reader, shard, keys):
            if (sample := reader.sample(shard, row)) is not None:
                records[sample.key] = sample
    if missing := [key for key in shards if key not in records]:
        raise ShardError(
            f"{reader}: {len(missing)} samples of identities.parquet aren't in its shards, the "
            f"first is {missing[0]}. Run the same command again that made the data set."
        )
    return records


def _rows(reader: DatasetReader, shard: int, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    table = reader.rows(shard, status=Status.OK)
    yield from table.filter(pc.is_in(table.column("key"), pa.array(keys))).to_pylist()
