"""The table of stored fields. A field of a record or an annotation states its Arrow type, what it
holds, and where it is stored.

The schemas, the samples' JSON, the data card, Croissant, the report and `inspect` are derived from
these entries; none of them lists fields by hand.
"""

from __future__ import annotations

import dataclasses
import json
import math
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
    """How a number is displayed: as a histogram in the report, as a line in `inspect`.

    scale: the stored number is multiplied by it, for example by 100 for percent. whole: show it as
    a whole number. group: the report shows metrics of one group together, those of
    pipelines/report/metrics.py first.
    """

    title: str
    unit: str = ""
    note: str = ""
    scale: float = 1
    whole: bool = False
    group: str = "image"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What a field holds and where it is stored.

    member: extension of the tar member that holds it; "": none. json: whether the sample's JSON
    holds it. column: whether it is a column of the sidecar. length: number of elements of a list;
    it is fixed, so that the JSON of all samples has one type.
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
    """A column of a sidecar. annotation: name of the annotation that it belongs to; "": none."""

    name: str
    type: pa.DataType
    description: str = ""
    metric: Metric | None = None
    annotation: str = ""

    def to_arrow(self) -> pa.Field:
        """Returns the Arrow field, with description, metric and annotation in its metadata."""
        metadata = {_DESCRIPTION: self.description.encode()}
        if self.metric:
            metadata[_METRIC] = json.dumps(asdict(self.metric), ensure_ascii=False).encode()
        if self.annotation:
            metadata[_ANNOTATION] = self.annotation.encode()
        return pa.field(self.name, self.type, metadata=metadata)

    @staticmethod
    def from_arrow(field: pa.Field) -> Column:
        """Returns the column of an Arrow field that `to_arrow` made. Ignores entries of a metric
        that this version doesn't have.
        """
        metadata = field.metadata or {}
        metric = None
        if _METRIC in metadata:
            values = json.loads(metadata[_METRIC])
            names = {entry.name for entry in fields(Metric)}
            metric = Metric(**{name: value for name, value in values.items() if name in names})
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
    """Returns a dataclass field with its entry in the table; see Stored for the arguments.

    Raises TypeError for a metric of a field that isn't a number.
    """
    if metric and not (pa.types.is_integer(type) or pa.types.is_floating(type)):
        raise TypeError(f"metric {metric.title!r}: expected a field of numbers, not of {type}")
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
    """Yields (name, entry) for each stored field of a dataclass, in order."""
    for entry in fields(kind):
        if _STORED in entry.metadata:
            yield entry.name, entry.metadata[_STORED]


def columns_of(kind: type[Any], annotation: str = "") -> list[Column]:
    """Returns the sidecar columns of a dataclass. annotation: as in Column."""
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
    """Returns the value that means "not recorded" for an entry's type: "", 0, 0.0, False, or a list
    of `entry.length` of these.
    """
    if pa.types.is_list(entry.type):
        return [_empty_scalar(entry.type.value_type)] * entry.length
    return _empty_scalar(entry.type)


def _empty_scalar(kind: pa.DataType) -> Any:
    if pa.types.is_boolean(kind):
        return False
    if pa.types.is_integer(kind):
        return 0
    return 0.0 if pa.types.is_floating(kind) else ""


class NotFiniteError(ValueError):
    """A field of an annotation is NaN or infinite."""


class Annotation:
    """Base of annotations: frozen dataclasses of what one stage records of an image.

    Its fields are made by `stored`. They are scalars, or tuples of scalars of a fixed length.
    Records hold an annotation's plain values under its `name`, so that code which doesn't have the
    class passes them on unchanged.
    """

    __slots__ = ()
    name: ClassVar[str]


Kind = TypeVar("Kind", bound=Annotation)


def to_plain(annotation: Annotation) -> dict[str, Any]:
    """Returns field name → JSON-ready value of the field's type: an int in a float field becomes a
    float, tuples become lists.

    Raises ValueError for None: readers of the shards rely on one type for each field. Raises
    NotFiniteError for NaN and infinity, which JSON doesn't have.
    """
    values: dict[str, Any] = {}
    for name, entry in stored_fields(type(annotation)):
        value = getattr(annotation, name)
        if value is None:
            raise ValueError(
                f"{annotation.name}.{name} is None: expected {entry.type}. A stage that can't "
                "measure a record returns it without the annotation."
            )
        plain = pa.scalar(value, entry.type).as_py()
        for number in plain if isinstance(plain, list) else [plain]:
            if isinstance(number, float) and not math.isfinite(number):
                raise NotFiniteError(f"{annotation.name}.{name} is {number}")
        values[name] = plain
    return values


def from_plain(kind: type[Kind], values: Mapping[str, Any]) -> Kind:
    """Returns the annotation with these values. A missing field gets its default, or the empty
    value of its type. Fields that the class doesn't have are ignored.
    """
    defaults = {entry.name: entry.default for entry in fields(kind)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for name, entry in stored_fields(kind):
        if name in values:
            value = values[name]
        elif defaults[name] is MISSING:
            value = empty_value(entry)
        else:
            continue
        arguments[name] = tuple(value) if isinstance(value, list) else value
    return kind(**arguments)
