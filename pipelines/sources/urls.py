"""Pictures behind a list of URLs: a column of parquet, CSV or TSV, or a text file with one on each
line.
"""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import IO, Any, Final

from configs.errors import SourceError
from configs.schema import DatasetConfig
from pipelines.sources.base import FACTS, Input, Source
from pipelines.sources.fetch import Fetcher, is_public
from pipelines.sources.paths import Found, facts_of, find_files
from pipelines.sources.seen import Seen
from pipelines.sources.tables import open_parquet

logger = logging.getLogger(__name__)

_ENDINGS: Final = (".parquet", ".csv", ".tsv", ".txt")
_ROWS: Final = 4096  # of a parquet list, read at a time
_USER: Final = re.compile(r"(?<=://)[^/?#]*@")


class UrlList(Source):
    """http(s) pictures. Columns of FACTS, where there are any, become facts."""

    def __init__(self, config: DatasetConfig) -> None:
        super().__init__(config)
        self.concurrency = self.config.downloads

    def list(self) -> Iterator[Input]:
        twice = 0
        with Seen() as seen:
            for file in find_files(self.config.path, _ENDINGS, self.output):
                ending = next((end for end in _ENDINGS if file.path.lower().endswith(end)), "")
                with file.open(seeking=ending == ".parquet") as stream:
                    for row in self._rows(file, stream, ending):
                        url = str(row[self.config.url_column] or "").strip()
                        if seen.add(_clean(_USER.sub("", url))):
                            yield self._input(row, url)
                        else:
                            twice += 1
        if twice:
            logger.warning(
                "%s: %d URLs stand in it more than once and are taken once", self.config.path, twice
            )

    def _input(self, row: Mapping[str, Any], url: str) -> Input:
        given = row.get(self.config.name_column) if self.config.name_column else None
        name = _USER.sub("", url) if given in (None, "") else str(given)
        return Input(
            source=_clean(name) or "(no URL)",
            locator=url.encode("utf-8", "surrogatepass"),
            facts=facts_of(row),
        )

    def _rows(self, file: Found, stream: IO[bytes], ending: str) -> Iterator[Mapping[str, Any]]:
        """Rows with the URL's column, and with those of its name and FACTS that there are."""
        if ending == ".parquet":
            with open_parquet(file.path, stream) as table:
                columns = self._columns(file, table.schema_arrow.names)
                for batch in table.iter_batches(_ROWS, columns=columns, use_threads=False):
                    yield from batch.to_pylist()
            return
        lines = io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="")
        try:
            if ending in (".csv", ".tsv"):
                reader: csv.DictReader[str] = csv.DictReader(
                    lines, delimiter="\t" if ending == ".tsv" else ","
                )
                self._columns(file, reader.fieldnames or ())
                yield from reader
            else:
                yield from ({self.config.url_column: line} for line in lines if line.strip())
        except csv.Error as error:
            raise SourceError(
                f"{file.path} is no such table ({error}). Mend it, or give one URL a line (.txt)."
            ) from None
        finally:
            lines.detach()  # the stream is its opener's to close

    def _columns(self, file: Found, names: Sequence[str]) -> Sequence[str]:
        """Those to be read. Raises SourceError where the URL's or the name's is missing."""
        config = self.config
        for setting, column in (
            ("url_column", config.url_column),
            ("name_column", config.name_column),
        ):
            if column and column not in names:
                raise SourceError(
                    f"{file.path}: no column source.{setting}={column!r}. It has "
                    f"{', '.join(names) or 'none'}."
                )
        wanted = {config.url_column, config.name_column, *FACTS}
        return [name for name in names if name in wanted]

    def read(self, item: Input, count: int = -1) -> bytes:
        """Raises as Fetcher.fetch."""
        data = self._fetcher.fetch(item.locator.decode("utf-8", "surrogatepass"))
        return data if count < 0 else data[:count]

    @cached_property
    def _fetcher(self) -> Fetcher:
        config = self.config
        allowed = (lambda address: True) if config.allow_private else is_public
        return Fetcher(allowed, config.timeout, self.limit, config.ignore_robots, config.downloads)


def _clean(name: str) -> str:
    return name.encode("utf-8", "replace").decode()
