"""Pictures in parquet tables: as bytes in a column, or as files whose names stand in one.

A row group is read page by page: memory is that of its largest page, and of the pictures that were
asked for. Row numbers in names are padded, so that a shard's inputs, which are sorted by name, lie
in few row groups.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import SourceError
from pipelines.sources.base import FACTS, Input, Transient
from pipelines.sources.files import read_file
from pipelines.sources.paths import Found, InsideFiles, facts_of, find_files, read_range, text
from stages.base import Failed
from stages.record import Record
from stages.storage.remote import is_local, is_transient

_ROWS: Final = 16  # pictures decoded at a time
_LISTED: Final = 4096  # rows listed at a time
_ABSOLUTE: Final = re.compile(r"[/\\]|[A-Za-z]:|[A-Za-z][A-Za-z0-9+.-]*://")
Place = tuple[str, int]  # file, row group


class ParquetTable(InsideFiles):
    """Parquet here or behind an fsspec URL. Columns of FACTS, where there are any, become facts."""

    def list(self) -> Iterator[Input]:
        for file in find_files(self.config.path, (".parquet",), self.output):
            with file.open() as stream, open_parquet(file.path, stream) as table:
                if self._has_images(file, table.schema_arrow):
                    yield from self._rows(file, table, "")
                else:
                    yield from self._rows(file, table, self.config.path_column)

    def _has_images(self, file: Found, schema: pa.Schema) -> bool:
        """True for a column of pictures, False for one of paths. Raises SourceError where it is
        neither.
        """
        config = self.config
        if config.name_column and config.name_column not in schema.names:
            raise SourceError(
                f"{file.path}: no column source.name_column={config.name_column!r}. It has "
                f"{', '.join(schema.names)}."
            )
        if config.image_column in schema.names:
            kind = schema.field(config.image_column).type
            if not _holds_bytes(kind):
                raise SourceError(
                    f"{file.path}: column {config.image_column!r} holds {kind}; expected bytes, "
                    "or a struct with "
                    "`bytes`. If it holds paths, give source.path_column and another "
                    "source.image_column."
                )
            return True
        if config.path_column in schema.names:
            return False
        if config.url_column in schema.names:
            raise SourceError(
                f"{file.path} holds no pictures but a column of URLs, {config.url_column!r}. Use "
                "source.kind=urls"
            )
        raise SourceError(
            f"{file.path}: no column {config.image_column!r} or {config.path_column!r}. It has "
            f"{', '.join(schema.names)}. Give source.image_column or source.path_column."
        )

    def _rows(self, file: Found, table: pq.ParquetFile, paths: str) -> Iterator[Input]:
        wanted = [name for name in (paths, self.config.name_column, *FACTS) if name]
        columns = [name for name in wanted if name in table.schema_arrow.names]
        number = 0
        for group in range(table.num_row_groups):
            for row, values in enumerate(_cells(table, group, columns)):
                name = values.get(self.config.name_column)
                place = {"path": values[paths]} if paths else {"group": group, "row": row}
                yield Input(
                    source=f"{file.name}#{number:09}" if name is None else text(str(name)),
                    locator=json.dumps({"table": file.path, **place}, default=repr).encode(),
                    version=file.version,
                    facts=facts_of(values),
                )
                number += 1

    def read(self, item: Input, count: int = -1) -> bytes:
        """Raises Failed: outside_source, no_image, not_a_file, unreadable, too_many_bytes;
        Transient: unreachable.
        """
        place = json.loads(item.locator)
        if "path" in place:
            return self._read_path(place["table"], place["path"], count)
        found = _taken(
            self._read_group((place["table"], place["group"]), [place["row"]]), place["row"]
        )
        return found if count < 0 else found[:count]

    def _read_path(self, table: str, name: Any, count: int) -> bytes:
        if not isinstance(name, str) or not name:
            raise Failed("no_image", "the row names no file")
        if _ABSOLUTE.match(name) or ".." in re.split(r"[/\\]", name) or "\0" in name:
            raise Failed("outside_source", f"{name[:100]!r} leaves the table's folder")
        path = f"{table.rpartition('/')[0]}/{name}"
        if is_local(self._fs):
            return read_file(os.fsencode(path), self.limit, count)
        data = read_range(self._fs, path, 0, self.limit + 1 if count < 0 else count)
        if len(data) > self.limit:
            raise Failed("too_many_bytes", f"over {self.limit:,} bytes")
        return data

    def records(self, items: Sequence[Input]) -> Iterator[Record]:
        """As the base's, but each row group is read once, however many of `items` lie in it."""
        places = {item.key: json.loads(item.locator) for item in items}
        if any("path" in place for place in places.values()):
            yield from super().records(items)
            return
        groups: dict[Place, list[Input]] = defaultdict(list)
        for item in items:
            groups[places[item.key]["table"], places[item.key]["group"]].append(item)
        done: dict[str, Record] = {}
        for place, members in groups.items():
            rows = {item.key: places[item.key]["row"] for item in members}
            found = self._read_rows(place, sorted(rows.values()))
            taken = partial(_taken_by, found, rows)
            done.update((item.key, self.record(item, taken)) for item in members)
        yield from (done.pop(item.key) for item in items)

    def _read_rows(self, place: Place, rows: Sequence[int]) -> dict[int, bytes | Failed]:
        """As `_read_group`, tried again while that may help; what fails for the group fails for
        each row.
        """
        try:
            found: dict[int, bytes | Failed] = self._retrying(self._read_group, place, rows)
        except Failed as verdict:
            return dict.fromkeys(rows, Failed(verdict.reason, verdict.detail))
        return found

    def _read_group(self, place: Place, rows: Sequence[int]) -> dict[int, bytes | Failed]:
        """row → its picture, or why there is none; a few rows are decoded at a time, and none after
        the last wanted.

        Raises Failed: not_a_file, unreadable; Transient: unreachable.
        """
        path, group = place
        wanted, found = frozenset(rows), dict[int, bytes | Failed]()
        column = self.config.image_column
        try:
            with self._fs.open(path, "rb") as stream, open_parquet(path, stream) as table:
                struct = pa.types.is_struct(table.schema_arrow.field(column).type)
                columns = [f"{column}.bytes" if struct else column]
                batches = table.iter_batches(
                    _ROWS, row_groups=[group], columns=columns, use_threads=False
                )
                start = 0
                for batch in batches:
                    cells = batch.column(0).field("bytes") if struct else batch.column(0)
                    for row in sorted(wanted & frozenset(range(start, start + len(cells)))):
                        found[row] = self._cell(cells[row - start])
                    start += len(cells)
                    if len(found) == len(wanted):
                        break
        except FileNotFoundError:
            raise Failed("not_a_file", "the table is gone") from None
        except (OSError, KeyError, IndexError, pa.ArrowException, SourceError) as error:
            if is_transient(error):
                raise Transient("unreachable", f"{type(error).__name__}: {error}") from None
            raise Failed("unreadable", f"{type(error).__name__}: {error}") from None
        return {
            row: found.get(row, Failed("unreadable", "the table has fewer rows now"))
            for row in rows
        }

    def _cell(self, cell: Any) -> bytes | Failed:
        if not cell.is_valid:
            return Failed("no_image", "its cell is null")
        data = cell.as_buffer()
        if data.size > self.limit:
            return Failed("too_many_bytes", f"{data.size:,} bytes, limit {self.limit:,}")
        picture: bytes = data.to_pybytes()
        return picture


def open_parquet(path: str, stream: Any) -> pq.ParquetFile:
    """To be read column by column, page by page. Raises SourceError where it is no parquet."""
    try:
        return pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
    except pa.ArrowInvalid as error:
        raise SourceError(
            f"{path} is no whole parquet file ({error}). Mend it, or take it out."
        ) from None


def _cells(table: pq.ParquetFile, group: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a group, with nothing but `columns`."""
    if not columns:
        yield from ({} for _ in range(table.metadata.row_group(group).num_rows))
        return
    for batch in table.iter_batches(
        _LISTED, row_groups=[group], columns=columns, use_threads=False
    ):
        yield from batch.to_pylist()


def _taken(found: dict[int, bytes | Failed], row: int) -> bytes:
    """The row's picture. Raises Failed where there is none."""
    answer = found[row]
    if isinstance(answer, Failed):
        raise answer
    return answer


def _taken_by(found: dict[int, bytes | Failed], rows: Mapping[str, int], item: Input) -> bytes:
    return _taken(found, rows[item.key])


def _holds_bytes(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_bytes(kind.field(place).type)
    is_bytes: bool = (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
    )
    return is_bytes
