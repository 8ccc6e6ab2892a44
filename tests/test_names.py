"""The lint for vague names: which names it rejects, and that it checks all definitions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.names import advice, faults


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("name", ["found", "_kept", "GIVEN", "told_", "things", "data2", "tmp_3"])
def test_vague_names(name: str) -> None:
    assert advice(name)


@pytest.mark.parametrize("name", ["matches", "found_keys", "is_known", "data", "pool2d", "i", "_"])
def test_names_that_are_allowed(name: str) -> None:
    assert not advice(name)


@pytest.mark.parametrize(
    "text",
    [
        "found = 1",
        "a, (b, *found) = 1, (2, 3)",
        "x: int = (found := 1)",
        "self.found = 1",
        "found: int",
        "for found in []: pass",
        "rows = [found for found in []]",
        "def found(): pass",
        "def f(a, *, found=1): pass",
        "f = lambda *found: 1",
        "class Found: pass",
        "with open('a') as found: pass",
        "try: pass\nexcept OSError as found: pass",
    ],
)
def test_every_kind_of_definition_is_checked(tmp_path: Path, text: str) -> None:
    write(tmp_path, "model/a.py", text)
    [line] = faults(tmp_path)
    assert (
        line.startswith(f"model/a.py:{2 if 'except' in text else 1} ") and "found" in line.lower()
    )


def test_uses_and_imports_are_not_definitions(tmp_path: Path) -> None:
    write(tmp_path, "model/a.py", "from hypothesis import given\nprint(given.found, f(kept=1))")
    assert list(faults(tmp_path)) == []


def test_all_folders_are_checked(tmp_path: Path) -> None:
    write(tmp_path, "stages/a.py", "kept = 1")
    write(tmp_path, "tests/stages/storage/b.py", "kept = 1")
    assert [line.split(":")[0] for line in faults(tmp_path)] == [
        "stages/a.py",
        "tests/stages/storage/b.py",
    ]
