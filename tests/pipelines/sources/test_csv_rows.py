"""CSV and TSV lists: a stray quote never makes rows vanish, and quoted line breaks are read."""

from __future__ import annotations

import csv
import io
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import SourceError
from pipelines.sources import build_source
from pipelines.sources.csv_rows import CsvRows
from tests.pipelines.helpers import config

ROWS = ["https://a.example/1.jpg,one", "https://a.example/2.jpg,two, too", "http://b.example/3,x"]


def rows_of(text: str, delimiter: str = ",", name: str = "") -> CsvRows:
    lines = io.StringIO(text, newline="")
    return CsvRows(
        path="list.csv", lines=lines, delimiter=delimiter, url_column="url", name_column=name
    )


def read(text: str, name: str = "") -> list[dict[str, str | None]]:
    return list(rows_of(text, name=name))


def refusal(text: str, name: str = "") -> str:
    with pytest.raises(SourceError) as caught:
        read(text, name)
    return str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_stray_quote_is_refused_with_the_line_where_the_row_starts(end: str) -> None:
    header, good, bad = "url,caption", "https://a.example/0.jpg,zero", 'https://a.example/1.jpg,"5'
    # not closed before the end of the file
    assert "list.csv, line 4: " in refusal(end.join([header, good, "", bad, *ROWS]))
    assert "list.csv, line 1: " in refusal(end.join(['"url,caption', good, *ROWS]))
    # closed by a second one, at the end of a cell and inside one
    for closing in ('https://a.example/2.jpg,6"', 'https://a.example/2.jpg,6" tall'):
        message = refusal(end.join([header, bad, *ROWS[:1], closing, *ROWS]))
        assert "list.csv, line 2: a quote joins the lines 2 to 4 " in message
    # swallows more than the csv module reads as one cell
    assert "from line 3 on" in refusal(end.join([header, good, bad, *ROWS * 3000]))


def test_a_stray_quote_before_the_url_is_refused() -> None:
    text = 'caption,url\n"one,https://a.example/1.jpg\n{}",https://a.example/2.jpg\n'
    assert "line 2: " in refusal(text.format("two"))
    assert "line 2: " in refusal(text.format("two, too"))
    assert "line 2: " in refusal('url\n"https://a.example/1.jpg\nhttps://a.example/2.jpg"\n')
    text = 'url,id\nhttps://a.example/1.jpg,"1\nftp://a.example/2.jpg,2"\n'
    assert "'id' would hold a line break" in refusal(text, name="id")
    assert len(read(text)) == 1


def test_a_list_with_a_stray_quote_is_refused_before_anything_starts(tmp_path: Path) -> None:
    for ending, delimiter in {"csv": ",", "tsv": "\t"}.items():
        lines = ["url,caption", ROWS[0], ROWS[1].replace(",", ',"', 1), ROWS[2]]
        (tmp_path / f"a.{ending}").write_text("\n".join(lines).replace(",", delimiter))
        source = build_source(config(tmp_path / f"a.{ending}", tmp_path / "out"))
        with pytest.raises(
            SourceError, match=rf"/a\.{ending}, line 3: a quote joins the lines 3 to 4"
        ):
            list(source.list())


def test_quoted_line_breaks_are_read() -> None:
    text = (
        "url,caption,source\n"
        'https://a.example/1.jpg,"two lines:\r\nsee https://b.example, ""quoted"" too",'
        "https://c.example/page\n"
        '"https://a.example/2.jpg","one\n\n\ntwo"\n'
        '"https://a.example/3.jpg\n",three,"\n"\n'
    )
    first, second, third = read(text)
    assert first["caption"] == 'two lines:\r\nsee https://b.example, "quoted" too'
    assert (second["caption"], second["source"]) == ("one\n\n\ntwo", None)
    assert third["url"] == "https://a.example/3.jpg\n"
    (last,) = read('"caption\n(English)",url\n"a, b\nc, d",https://a.example/1.jpg\n')
    assert last == {"caption\n(English)": "a, b\nc, d", "url": "https://a.example/1.jpg"}


@given(
    st.lists(st.text(st.sampled_from('ab ,"\n\r'), max_size=9), min_size=1, max_size=4),
    st.booleans(),
)
def test_what_a_csv_writer_writes_is_read_as_it_was(captions: list[str], url_first: bool) -> None:
    names = ["url", "caption"] if url_first else ["caption", "url"]
    rows = [
        {"url": f"https://a.example/{number}.jpg", "caption": caption}
        for number, caption in enumerate(captions)
    ]
    with io.StringIO(newline="") as out:
        writer = csv.DictWriter(out, names)
        writer.writeheader()
        writer.writerows(rows)
        assert read(out.getvalue()) == rows


@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize("header", ["url,caption", "caption,url", "url"])
def test_no_row_vanishes_wherever_one_or_two_quotes_are_put(header: str, delimiter: str) -> None:
    columns = {"url": ["http://a.b/1", "http://a.b/2", "http://a.b/3"], "caption": ["x", "y,", ""]}
    rows = zip(*(columns[name] for name in header.split(",")), strict=True)
    lines = [header.replace(",", delimiter), *(delimiter.join(row) for row in rows)]
    text = "\n".join(lines)
    refused = 0
    places = range(len(text) + 1)
    for cuts in [*combinations(places, 1), *combinations(places, 2)]:
        parts = [text[start:end] for start, end in pairwise((0, *cuts, len(text)))]
        try:
            rows_of_list = rows_of('"'.join(parts), delimiter)
            if "url" in rows_of_list.names:  # else the list is refused for that
                assert len(list(rows_of_list)) == 3, cuts
        except SourceError:
            refused += 1
    assert refused > 50
