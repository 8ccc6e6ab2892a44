"""InputIndex: planned inputs keep their place, new ones follow, and names must be unique."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from configs.errors import ConfigError
from pipelines.planning.input_index import InputIndex
from pipelines.sources import Input


def item(source: str, size: int = 1, version: str = "", locator: bytes = b"at") -> Input:
    return Input(source=source, locator=locator, size=size, version=version)


def plan_rows(*shards: list[Input]) -> list[dict[str, Any]]:
    """Returns the rows of an earlier plan with these shards."""
    return [
        {
            "key": each.key,
            "source": each.source,
            "locator": each.locator,
            "size": each.size,
            "version": each.version,
            "facts": each.provenance,
            "shard": number,
        }
        for number, inputs in enumerate(shards)
        for each in inputs
    ]


def placed(index: InputIndex) -> list[list[str]]:
    """Returns the names in each shard."""
    shards = list(index.shards())
    assert [number for number, _ in shards] == list(range(len(shards)))
    return [[row["source"] for row in rows] for _, rows in shards]


def test_new_inputs_are_sorted_by_the_bytes_of_their_names_and_divided_into_shards() -> None:
    with InputIndex() as index:
        for name in ("b", "a", "ü", "Z", "c"):
            index.add_listed(item(name))
        assert index.assign_shards(2) == (5, 0, 0)
        assert placed(index) == [["Z", "a"], ["b", "c"], ["ü"]]
        assert len(index) == 5


def test_planned_inputs_keep_shard_and_order_and_new_ones_go_into_new_shards() -> None:
    with InputIndex() as index:
        index.load_previous_plan(plan_rows([item("c"), item("a")], [item("b")]))
        for name in ("0", "c", "b", "1", "a"):
            index.add_listed(item(name))
        assert index.assign_shards(2) == (2, 0, 0)
        assert placed(index) == [["c", "a"], ["b"], ["0", "1"]], "shard 1 gets no new inputs"


def test_a_vanished_input_keeps_its_place() -> None:
    with InputIndex() as index:
        index.load_previous_plan(plan_rows([item("a"), item("b")]))
        index.add_listed(item("b"))
        assert index.assign_shards(2) == (0, 0, 1)
        assert placed(index) == [["a", "b"]]


@pytest.mark.parametrize(
    ("now", "changed"),
    [
        (item("a", 7, "v1"), 0),
        (item("a", 8, "v1"), 1),
        (item("a", 7, "v2"), 1),
        (item("a", 7, "v1", b"elsewhere"), 0),
        (replace(item("a", 7, "v1"), provenance='{"license": "CC0"}'), 0),
        (replace(item("a", 7, "v1"), provenance='{"person": "Ada"}'), 1),
    ],
    ids=["same", "size", "version", "locator", "license", "person"],
)
def test_an_input_is_changed_if_its_size_version_or_person_differs(
    now: Input, changed: int
) -> None:
    with InputIndex() as index:
        index.load_previous_plan(plan_rows([item("a", 7, "v1")]))
        index.add_listed(now)
        assert index.assign_shards(2) == (0, changed, 0)
        [(_, [row])] = index.shards()
        assert (row["size"], row["version"], row["locator"]) == (
            now.size,
            now.version,
            now.locator,
        )


@pytest.mark.parametrize("rows", [[], plan_rows([item("a")])], ids=["new", "planned"])
def test_two_inputs_with_one_name_are_an_error(rows: list[dict[str, Any]]) -> None:
    with InputIndex() as index:
        index.load_previous_plan(rows)
        index.add_listed(item("a", locator=b"first"))
        with pytest.raises(ConfigError, match=r"two inputs are called 'a' .*first.* and .*second"):
            index.add_listed(item("a", locator=b"second"))


def test_inputs_are_grouped_by_sizes_that_repeat_and_are_within_the_limits() -> None:
    sizes = {"a": 5, "b": 9, "c": 5, "d": 7, "e": 0, "f": 0, "g": 99, "h": 99, "i": -1, "j": -1}
    with InputIndex() as index:
        for name, size in sizes.items():
            index.add_listed(item(name, size))
        index.add_listed(item("0", 9))
        index.assign_shards(3)
        groups = [[each.source for each in group] for group in index.groups_of_equal_size(1, 98)]
        assert groups == [["a", "c"], ["0", "b"]], "by size, each in the plan's order"


def test_groups_of_equal_size_are_in_the_order_of_the_plan_and_without_vanished_inputs() -> None:
    with InputIndex() as index:
        index.load_previous_plan(plan_rows([item("z", 3), item("vanished", 3)]))
        index.add_listed(item("a", 3))
        index.add_listed(item("z", 3))
        index.assign_shards(5)
        [group] = index.groups_of_equal_size(1, 10)
        assert [each.source for each in group] == ["z", "a"]


def test_an_exact_copy_is_recorded_with_its_original() -> None:
    with InputIndex() as index:
        for name in ("a", "b"):
            index.add_listed(item(name))
        index.assign_shards(5)
        index.mark_exact_copy(item("b"), item("a"))
        [(_, rows)] = index.shards()
        assert [row["duplicate_of"] for row in rows] == ["", "a"]
