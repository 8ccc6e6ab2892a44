"""Exact copies: they are found by their bytes, and few files are read completely."""

from __future__ import annotations

from pipelines.planning.exact_copies import mark_exact_copies
from pipelines.planning.input_index import InputIndex
from tests.pipelines.planning.helpers import Memory

PREFIX = 4096
LARGE = bytes(range(256)) * 40  # longer than the prefix that is compared first


def copies(source: Memory) -> dict[str, str]:
    """Returns name of a copy → name of its original."""
    with InputIndex() as index:
        for item in source.list():
            index.add_listed(item)
        index.assign_shards(3)
        mark_exact_copies(index, source, frozenset())
        rows = [row for _, rows in index.shards() for row in rows]
    return {row["source"]: row["duplicate_of"] for row in rows if row["duplicate_of"]}


def test_each_copy_names_the_first_input_with_its_bytes() -> None:
    source = Memory({"d": b"one", "a": b"one", "c": b"two", "b": b"two", "e": b"one", "f": b"six"})
    assert copies(source) == {"d": "a", "e": "a", "c": "b"}


def test_an_input_with_a_unique_size_is_not_read() -> None:
    source = Memory({"a": b"1", "b": b"22", "c": b"333"})
    assert copies(source) == {} and source.reads == []


def test_a_file_is_read_completely_only_if_another_has_the_same_beginning() -> None:
    other = b"x" + LARGE[1:]
    source = Memory({"a": LARGE, "b": LARGE, "c": other, "d": LARGE[:-1] + b"x"})
    assert copies(source) == {"b": "a"}
    assert sorted(source.reads) == [
        *[("a", -1), ("a", PREFIX), ("b", -1), ("b", PREFIX)],
        *[("c", PREFIX), ("d", -1), ("d", PREFIX)],
    ]


def test_empty_and_too_large_files_are_not_compared() -> None:
    source = Memory({"a": b"", "b": b"", "c": b"123", "d": b"123"})
    source.max_bytes = 2
    assert copies(source) == {} and source.reads == []


def test_an_unreadable_input_is_neither_copy_nor_original() -> None:
    equal = {"a": b"one", "b": b"one", "c": b"one", "d": b"one"}
    assert copies(Memory(equal, unreadable=frozenset({"a", "d"}))) == {"c": "b"}
