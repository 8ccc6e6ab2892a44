"""Images behind a list of URLs: a column of a parquet, CSV or TSV table, or a text file with one
URL a line.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import IO, Any, Final

from configs.errors import SourceError
from configs.schema import DatasetConfig
from pipelines.sources.base import Input, Source
from pipelines.sources.csv_rows import CsvRows
from pipelines.sources.fetch import Fetcher, is_public
from pipelines.sources.name_set import NameSet
from pipelines.sources.paths import SourceFile, find_files, provenance_json
from pipelines.sources.tables import open_parquet
from stages.record import PROVENANCE

logger = logging.getLogger(__name__)

_EXTENSIONS: Final = (".parquet", ".csv", ".tsv", ".txt")
_BATCH_ROWS: Final = 4096  # rows of a parquet table read at a time
_CREDENTIALS: Final = re.compile(r"(?<=://)[^/?#]*@")  # USER:PASSWORD@ in a URL


class UrlList(Source):
    """http(s) URLs. Columns named as in PROVENANCE become the inputs' provenance.

    A URL that occurs more than once is one input.
    """

    def __init__(self, config: DatasetConfig) -> None:
        super().__init__(config)
        self.concurrency = self.config.downloads

    def list(self) -> Iterator[Input]:
        repeated = 0
        with NameSet() as urls:
            for file in find_files(self.config.path, _EXTENSIONS, self.output):
                path = file.path.lower()
                extension = next((end for end in _EXTENSIONS if path.endswith(end)), "")
                with file.open(seekable=extension == ".parquet") as stream:
                    for row in self._rows(file, stream, extension):
                        url = str(row[self.config.url_column] or "").strip()
                        if urls.add(_to_utf8(_CREDENTIALS.sub("", url))):
                            yield self._input(row, url)
                        else:
                            repeated += 1
        if repeated:
            logger.warning(
                "%s: %d URLs are listed more than once and are used once",
                self.config.path,
                repeated,
            )

    def _input(self, row: Mapping[str, Any], url: str) -> Input:
        name = row.get(self.config.name_column) if self.config.name_column else None
        source = _CREDENTIALS.sub("", url) if name in (None, "") else str(name)
        return Input(
            source=_to_utf8(source) or "(no URL)",
            locator=url.encode("utf-8", "surrogatepass"),
            provenance=provenance_json(row),
        )

    def _rows(
        self, file: SourceFile, stream: IO[bytes], extension: str
    ) -> Iterator[Mapping[str, Any]]:
        """Yields column → value of each row, with the columns for URL, name and provenance."""
        if extension == ".parquet":
            with open_parquet(file.path, stream) as table:
                columns = self._columns(file, table.schema_arrow.names)
                for batch in table.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
                    yield from batch.to_pylist()
            return
        lines = io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="")
        try:
            if extension in (".csv", ".tsv"):
                rows = CsvRows(
                    path=file.path,
                    lines=lines,
                    delimiter="\t" if extension == ".tsv" else ",",
                    url_column=self.config.url_column,
                    name_column=self.config.name_column,
                )
                self._columns(file, rows.names)
                yield from rows
            else:
                yield from ({self.config.url_column: line} for line in lines if line.strip())
        finally:
            lines.detach()  # keep the stream open: who opened it closes it

    def _columns(self, file: SourceFile, names: Sequence[str]) -> Sequence[str]:
        """Returns those of `names` to read. Raises SourceError if a configured one is missing."""
        config = self.config
        required = {"url_column": config.url_column, "name_column": config.name_column}
        for setting, column in required.items():
            if column and column not in names:
                raise SourceError(
                    f"{file.path}: no column source.{setting}={column!r}. It has "
                    f"{', '.join(names) or 'none'}."
                )
        wanted = {config.url_column, config.name_column, *PROVENANCE}
        return [name for name in names if name in wanted]

    def read(self, item: Input, count: int = -1) -> bytes:
        """Raises what `Fetcher.fetch` raises."""
        data = self._fetcher.fetch(item.locator.decode("utf-8", "surrogatepass"))
        return data if count < 0 else data[:count]

    @cached_property
    def _fetcher(self) -> Fetcher:
        config = self.config
        return Fetcher(
            is_allowed=(lambda address: True) if config.allow_private else is_public,
            timeout=config.timeout,
            max_bytes=self.max_bytes,
            ignore_robots=config.ignore_robots,
            concurrency=config.downloads,
        )


def _to_utf8(text: str) -> str:
    """Returns `text` with characters that UTF-8 can't encode replaced by "?"."""
    return text.encode("utf-8", "replace").decode()
