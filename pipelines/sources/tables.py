"""Images in parquet tables: bytes in a column, or files whose paths are in a column.

A row group is read page by page, so memory holds its largest page and the requested images only.
Row numbers in input names are zero-padded: inputs are sorted by name before they are divided into
shards, so a shard's inputs lie in few row groups.
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
from pipelines.sources.base import Input, TransientFailure
from pipelines.sources.files import read_file
from pipelines.sources.paths import (
    ContainerSource,
    SourceFile,
    find_files,
    provenance_json,
    read_range,
    to_unicode,
)
from stages.base import Failed, Rejection
from stages.record import PROVENANCE, Record
from stages.storage.remote import is_local, is_transient

_READ_ROWS: Final = 16  # rows with images decoded at a time
_LIST_ROWS: Final = 4096  # rows without images listed at a time
# a path from the root, with a drive letter, or a URL
_ABSOLUTE: Final = re.compile(r"[/\\]|[A-Za-z]:|[A-Za-z][A-Za-z0-9+.-]*://")
RowGroup = tuple[str, int]  # path of the table, number of the row group


class ParquetTable(ContainerSource):
    """Parquet tables, local or behind an fsspec URL.

    Columns named as in PROVENANCE become the inputs' provenance.
    """

    def list(self) -> Iterator[Input]:
        for file in find_files(self.config.path, (".parquet",), self.output):
            with file.open() as stream, open_parquet(file.path, stream) as table:
                if self._has_image_column(file, table.schema_arrow):
                    yield from self._inputs(file, table, "")
                else:
                    yield from self._inputs(file, table, self.config.path_column)

    def _has_image_column(self, file: SourceFile, schema: pa.Schema) -> bool:
        """True if the table has a column of image bytes, False if it has a column of paths.

        Raises SourceError if it has neither.
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
                    "or a struct with `bytes`. If it holds paths, give source.path_column and "
                    "another source.image_column."
                )
            return True
        if config.path_column in schema.names:
            return False
        if config.url_column in schema.names:
            raise SourceError(
                f"{file.path} holds no images but a column of URLs, {config.url_column!r}. Use "
                "source.kind=urls"
            )
        raise SourceError(
            f"{file.path}: no column {config.image_column!r} or {config.path_column!r}. It has "
            f"{', '.join(schema.names)}. Give source.image_column or source.path_column."
        )

    def _inputs(self, file: SourceFile, table: pq.ParquetFile, path_column: str) -> Iterator[Input]:
        """Yields an input for each row. path_column: "" if the rows hold the images themselves."""
        wanted = (path_column, self.config.name_column, *PROVENANCE)
        columns = [name for name in wanted if name and name in table.schema_arrow.names]
        number = 0
        for group in range(table.num_row_groups):
            for row, values in enumerate(_read_columns(table, group, columns)):
                name = values.get(self.config.name_column)
                place = {"group": group, "row": row}
                if path_column:
                    place = {"path": values[path_column]}
                yield Input(
                    source=f"{file.name}#{number:09}" if name is None else to_unicode(str(name)),
                    locator=json.dumps({"table": file.path, **place}, default=repr).encode(),
                    version=file.version,
                    provenance=provenance_json(values),
                )
                number += 1

    def read(self, item: Input, count: int = -1) -> bytes:
        """Raises Failed: outside_source, no_image, not_a_file, unreadable, too_many_bytes;
        TransientFailure: unreachable.
        """
        locator = json.loads(item.locator)
        if "path" in locator:
            return self._read_path(locator["table"], locator["path"], count)
        row = locator["row"]
        images = self._read_rows((locator["table"], locator["group"]), [row])
        data = _bytes_or_raise(images[row])
        return data if count < 0 else data[:count]

    def _read_path(self, table: str, name: Any, count: int) -> bytes:
        """Returns the bytes of the file `name`, relative to the table's folder."""
        if not isinstance(name, str) or not name:
            raise Failed("no_image", "the row names no file")
        if _ABSOLUTE.match(name) or ".." in re.split(r"[/\\]", name) or "\0" in name:
            raise Failed("outside_source", f"{name[:100]!r} leaves the table's folder")
        folder = table.rpartition("/")[0]
        path = f"{folder}/{name}"
        if is_local(self._fs):
            # not Path.resolve, which raises for a loop of links
            top, target = os.path.realpath(folder or "/"), os.path.realpath(path)
            if os.path.commonpath([top, target]) != top:
                raise Failed(
                    "outside_source", f"{name[:100]!r} is a link out of the table's folder"
                )
            return read_file(os.fsencode(path), self.max_bytes, count)
        data = read_range(self._fs, path, 0, self.max_bytes + 1 if count < 0 else count)
        if len(data) > self.max_bytes:
            raise Failed("too_many_bytes", f"over {self.max_bytes:,} bytes")
        return data

    def records(self, items: Sequence[Input]) -> Iterator[Record]:
        """See `Source.records`. Reads each row group once, however many of `items` are in it."""
        listed = [item for item in items if not item.vanished]
        if _are_paths(listed):
            yield from super().records(items)
            return
        # a vanished input has no locator if the plan was lost
        records = {item.key: self.record(item) for item in items if item.vanished}
        for members, row_of, images in self._row_groups(listed):
            read = partial(_row_bytes, images, row_of)
            records.update((item.key, self.record(item, read)) for item in members)
        yield from (records.pop(item.key) for item in items)

    def heads(self, items: Sequence[Input], count: int) -> Iterator[bytes | Rejection]:
        """See `Source.heads`. Reads whole images, and each row group once."""
        if _are_paths(items):
            yield from super().heads(items, count)
            return
        heads: dict[str, bytes | Rejection] = {}
        for members, row_of, images in self._row_groups(items):
            for item in members:
                image = images[row_of[item.key]]
                heads[item.key] = image if isinstance(image, Failed) else image[:count]
        yield from (heads.pop(item.key) for item in items)

    def _row_groups(
        self, items: Sequence[Input]
    ) -> Iterator[tuple[Sequence[Input], dict[str, int], dict[int, bytes | Failed]]]:
        """Yields for each row group: those of `items` in it, key → row, and row → image."""
        locators = {item.key: json.loads(item.locator) for item in items}
        items_by_group: dict[RowGroup, list[Input]] = defaultdict(list)
        for item in items:
            locator = locators[item.key]
            items_by_group[locator["table"], locator["group"]].append(item)
        for group, members in items_by_group.items():
            row_of = {item.key: locators[item.key]["row"] for item in members}
            yield members, row_of, self._read_rows_or_failures(group, sorted(row_of.values()))

    def _read_rows_or_failures(
        self, group: RowGroup, rows: Sequence[int]
    ) -> dict[int, bytes | Failed]:
        """Returns what `_read_rows` returns, with retries; if the row group can't be read, its
        failure for every row.
        """
        try:
            images: dict[int, bytes | Failed] = self._retrying(self._read_rows, group, rows)
        except Failed as failure:
            return dict.fromkeys(rows, Failed(failure.reason, failure.detail))
        return images

    def _read_rows(self, group: RowGroup, rows: Sequence[int]) -> dict[int, bytes | Failed]:
        """Returns row → image bytes, or why the row has none.

        Decodes a few rows at a time, and none after the last of `rows`. Raises Failed: not_a_file,
        unreadable; TransientFailure: unreachable.
        """
        path, number = group
        wanted, images = frozenset(rows), dict[int, bytes | Failed]()
        column = self.config.image_column
        try:
            with self._fs.open(path, "rb") as stream, open_parquet(path, stream) as table:
                is_struct = pa.types.is_struct(table.schema_arrow.field(column).type)
                columns = [f"{column}.bytes" if is_struct else column]
                batches = table.iter_batches(
                    _READ_ROWS, row_groups=[number], columns=columns, use_threads=False
                )
                start = 0
                for batch in batches:
                    cells = batch.column(0).field("bytes") if is_struct else batch.column(0)
                    for row in sorted(wanted & frozenset(range(start, start + len(cells)))):
                        images[row] = self._cell_bytes(cells[row - start])
                    start += len(cells)
                    if len(images) == len(wanted):
                        break
        except FileNotFoundError:
            raise Failed("not_a_file", "the table is gone") from None
        except (OSError, KeyError, IndexError, pa.ArrowException, SourceError) as error:
            if is_transient(error):
                raise TransientFailure("unreachable", f"{type(error).__name__}: {error}") from None
            raise Failed("unreadable", f"{type(error).__name__}: {error}") from None
        missing = Failed("unreadable", "the table has fewer rows now")
        return {row: images.get(row, missing) for row in rows}

    def _cell_bytes(self, cell: Any) -> bytes | Failed:
        if not cell.is_valid:
            return Failed("no_image", "its cell is null")
        data = cell.as_buffer()
        if data.size > self.max_bytes:
            return Failed("too_many_bytes", f"{data.size:,} bytes, limit {self.max_bytes:,}")
        image: bytes = data.to_pybytes()
        return image


def _are_paths(items: Sequence[Input]) -> bool:
    """Returns whether inputs are files, whose paths the tables hold, or rows."""
    return any("path" in json.loads(item.locator) for item in items)


def open_parquet(path: str, stream: Any) -> pq.ParquetFile:
    """Opens a parquet file to be read column by column and page by page, without prefetching.

    Raises SourceError if it isn't a complete parquet file.
    """
    try:
        return pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
    except pa.ArrowInvalid as error:
        # This message also becomes the `detail` of records: rewording it would change data sets.
        raise SourceError(
            f"{path} is no whole parquet file ({error}). Mend it, or take it out."
        ) from None


def _read_columns(
    table: pq.ParquetFile, group: int, columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yields column → value of each row in a row group, for `columns` only."""
    if not columns:
        yield from ({} for _ in range(table.metadata.row_group(group).num_rows))
        return
    for batch in table.iter_batches(
        _LIST_ROWS, row_groups=[group], columns=columns, use_threads=False
    ):
        yield from batch.to_pylist()


def _bytes_or_raise(image: bytes | Failed) -> bytes:
    if isinstance(image, Failed):
        raise image
    return image


def _row_bytes(
    images: Mapping[int, bytes | Failed], row_of: Mapping[str, int], item: Input
) -> bytes:
    return _bytes_or_raise(images[row_of[item.key]])


def _holds_bytes(kind: Any) -> bool:
    """True if `kind` is a binary Arrow type, or a struct with a binary field `bytes`."""
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    is_bytes: bool = (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
    )
    return is_bytes
