"""Reads the rows of CSV and TSV files, and refuses rows that a stray quote joins.

A quote at the start of a cell opens a quoted cell, which may hold line breaks. A stray one
therefore swallows the lines up to the next quote, or to the end of the file, and Python's csv
module doesn't report it.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from configs.errors import SourceError

_URL: Final = re.compile(r'[\s"]*https?://', re.IGNORECASE)
_LINE_BREAK: Final = re.compile(r"[\r\n]")


@dataclass(kw_only=True)
class CsvRows:
    """The rows of one file. path: for messages. lines: of the file, with their ends. url_column,
    name_column: names of columns ("": none), whose cells hold no line breaks.

    names: the first row, which names the columns; [] for an empty file. Raises SourceError where a
    row spans several lines, and its quotes don't match, or more than one of the lines holds a URL.
    """

    path: str
    lines: Iterable[str]
    delimiter: str
    url_column: str
    name_column: str = ""
    names: Sequence[str] = ()
    _row_lines: list[str] = field(default_factory=list)  # of the row that is being read
    _first: int = 1  # number of its first line

    def __post_init__(self) -> None:
        self._reader = csv.reader(self._remembered(), delimiter=self.delimiter)
        self.names = next(self._rows(), [])
        if len(self._row_lines) > 1 and self.url_column not in self.names:
            raise self._joined(f"no column of it is named {self.url_column!r}")
        self._check(self.names, urls=0)

    def __iter__(self) -> Iterator[dict[str, str | None]]:
        """Yields column → cell of each row; None for cells that a short row lacks."""
        missing = [None] * len(self.names)
        for row in self._rows():
            self._check(row, urls=1)
            yield dict(zip(self.names, (*row, *missing), strict=False))

    def _remembered(self) -> Iterator[str]:
        for line in self.lines:
            self._row_lines.append(line)
            yield line

    def _rows(self) -> Iterator[list[str]]:
        """Yields the rows that are not empty."""
        while True:
            self._first += len(self._row_lines)
            self._row_lines.clear()
            try:
                row = next(self._reader, None)
            except csv.Error as error:
                raise SourceError(
                    f"{self.path} can't be read from line {self._first} on ({error}). If a quote "
                    "in that line isn't closed, close or remove it; else give a text file (.txt) "
                    "with one URL a line."
                ) from None
            if row is None:
                return
            if row:
                yield row

    def _check(self, row: Sequence[str], urls: int) -> None:
        """Raises SourceError if the row's lines are several rows. urls: lines with a URL in the
        place of the URL that one row has.
        """
        if len(self._row_lines) < 2:
            return
        try:
            # strict: a quote closes a cell only before a delimiter or at the end
            rows = list(csv.reader(self._row_lines, delimiter=self.delimiter, strict=True))
        except csv.Error as error:
            raise self._joined(str(error)) from None
        column = self.names.index(self.url_column)
        if len(rows) != 1 or sum(self._holds_url(line, column) for line in self._row_lines) > urls:
            raise self._joined("they hold several URLs")
        for name, cell in zip(self.names, row, strict=False):
            if name in (self.url_column, self.name_column) and _LINE_BREAK.search(cell.strip()):
                raise self._joined(f"the cell of column {name!r} would hold a line break")

    def _holds_url(self, line: str, column: int) -> bool:
        """Returns whether the line has a URL where a row has it, counted from the left or from the
        right: delimiters in the text of another cell shift one of the two.
        """
        cells = line.split(self.delimiter)
        places = (column, len(cells) - len(self.names) + column)
        return any(
            0 <= place < len(cells) and _URL.match(cells[place]) is not None for place in places
        )

    def _joined(self, why: str) -> SourceError:
        last = self._first + len(self._row_lines) - 1
        return SourceError(
            f"{self.path}, line {self._first}: a quote joins the lines {self._first} to {last} to "
            f"one row ({why}). If they are several rows, remove the stray quote, or double it and "
            "quote its cell. If they are one row, write it on one line."
        )
