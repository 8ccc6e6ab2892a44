"""The table of stored fields: each field of a record or an annotation says here what it holds, its
Arrow type, and where it is kept.

Schemas, sample JSON, the data card, Croissant, the report and `inspect` are derived from these
entries; none of them lists fields by hand.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar, Final, TypeVar

import pyarrow as pa

_STORED: Final = "stored"
_DESCRIPTION: Final = b"description"
_METRIC: Final = b"metric"
_ANNOTATION: Final = b"annotation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """How people see a number: as a histogram in the report, as a line in `inspect`.

    scale: what is shown is the number times this, for example 100 for percent. whole: whole
    numbers. group: the report shows metrics of one group together.
    """

    title: str
    unit: str = ""
    note: str = ""
    scale: float = 1
    whole: bool = False
    group: str = "picture"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What a field holds and where it is kept.

    member: extension of the tar member that holds it, "" for none. json: part of the sample's JSON.
    column: a column of the sidecar. length: of a list; a list in JSON has a fixed length, so that
    the JSON of all samples has one type.
    """

    description: str
    type: pa.DataType
    member: str = ""
    json: bool = True
    column: bool = True
    length: int = 0
    metric: Metric | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a sidecar. annotation: name of the annotation that it belongs to, or ""."""

    name: str
    type: pa.DataType
    description: str = ""
    metric: Metric | None = None
    annotation: str = ""

    def to_arrow(self) -> pa.Field:
        """The Arrow field, with description, metric and annotation in its metadata."""
        metadata = {_DESCRIPTION: self.description.encode()}
        if self.metric:
            metadata[_METRIC] = json.dumps(asdict(self.metric), ensure_ascii=False).encode()
        if self.annotation:
            metadata[_ANNOTATION] = self.annotation.encode()
        return pa.field(self.name, self.type, metadata=metadata)

    @staticmethod
    def from_arrow(field: pa.Field) -> Column:
        """The inverse of `to_arrow`. Entries that a later program added to a metric are ignored."""
        metadata = field.metadata or {}
        metric = None
        if _METRIC in metadata:
            values = json.loads(metadata[_METRIC])
            known = {entry.name for entry in fields(Metric)}
            metric = Metric(**{name: value for name, value in values.items() if name in known})
        return Column(
            name=field.name,
            type=field.type,
            description=metadata.get(_DESCRIPTION, b"").decode(),
            metric=metric,
            annotation=metadata.get(_ANNOTATION, b"").decode(),
        )


def stored(
    description: str,
    type: pa.DataType,
    *,
    default: Any = MISSING,
    member: str = "",
    json: bool = True,
    column: bool = True,
    length: int = 0,
    metric: Metric | None = None,
) -> Any:
    """A dataclass field with its entry in the table; see Stored."""
    entry = Stored(
        description=description,
        type=type,
        member=member,
        json=json,
        column=column,
        length=length,
        metric=metric,
    )
    return dataclasses.field(default=default, metadata={_STORED: entry})


def stored_fields(kind: type[Any]) -> Iterator[tuple[str, Stored]]:
    """(name, entry) of each stored field of a dataclass, in order."""
    for entry in fields(kind):
        if _STORED in entry.metadata:
            yield entry.name, entry.metadata[_STORED]


def columns_of(kind: type[Any], annotation: str = "") -> list[Column]:
    """The sidecar columns of a dataclass."""
    return [
        Column(
            name=name,
            type=entry.type,
            description=entry.description,
            metric=entry.metric,
            annotation=annotation,
        )
        for name, entry in stored_fields(kind)
        if entry.column
    ]


def empty_value(entry: Stored) -> Any:
    """The plain value of an entry's type that stands for "not recorded": "", 0, 0.0, False, or a
    list of them."""
    if pa.types.is_list(entry.type):
        return [_empty_scalar(entry.type.value_type)] * entry.length
    return _empty_scalar(entry.type)


def _empty_scalar(kind: pa.DataType) -> Any:
    if pa.types.is_boolean(kind):
        return False
    if pa.types.is_integer(kind):
        return 0
    return 0.0 if pa.types.is_floating(kind) else ""


class Annotation:
    """Base of what one stage records of a picture: a frozen dataclass of stored fields.

    Its fields are scalars, or tuples of scalars of a fixed length. Records carry its plain values
    under `name`, so that code which doesn't know the class passes them on unchanged.
    """

    __slots__ = ()
    name: ClassVar[str]


Kind = TypeVar("Kind", bound=Annotation)


def to_plain(annotation: Annotation) -> dict[str, Any]:
    """JSON-ready values by field name; tuples become lists."""
    values = {name: getattr(annotation, name) for name, _ in stored_fields(type(annotation))}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def from_plain(kind: type[Kind], values: Mapping[str, Any]) -> Kind:
    """The annotation with these values. A missing field gets its default, or its type's empty
    value; fields that the class doesn't have are ignored.
    """
    defaults = {entry.name: entry.default for entry in fields(kind)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for name, entry in stored_fields(kind):
        if name in values:
            given[name] = values[name]
        elif defaults[name] is MISSING:
            given[name] = empty_value(entry)
        else:
            continue
        if isinstance(given[name], list):
            given[name] = tuple(given[name])
    return kind(**given)
