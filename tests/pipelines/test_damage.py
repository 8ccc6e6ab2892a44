"""Damaged tables of a data set: commands name the file in one line, without a traceback."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from stages.storage.layout import DUPLICATES, IDENTITIES, PLAN

DATASET = Path("tests/data/dataset_v2")
SIDECAR = "shards/fgid-000000.parquet"
# file → the commands that read it
READERS = {
    SIDECAR: ("lint", "report", "inspect", "export-json", "retry"),
    IDENTITIES: ("lint", "report", "retry"),
    DUPLICATES: ("lint", "retry"),
    PLAN: ("status", "retry"),
}


def arguments(command: str, output: Path, folder: Path) -> list[str]:
    if command == "retry":
        source = folder / "photos"
        source.mkdir()
        (source / "a.jpg").write_bytes(b"a")
        overrides = [f"source.path={source}", "executor=inline", "threads=1"]
        return ["retry", str(output), "--reason", "truncated", *overrides]
    more = {"inspect": ["portrait-1.jpg"], "export-json": [str(folder / "exported")]}
    return [command, str(output), *more.get(command, [])]


CASES = [(name, command) for name, commands in READERS.items() for command in commands]


@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
@pytest.mark.parametrize(("name", "command"), CASES)
def test_a_damaged_table_is_named_in_one_line(
    tmp_path: Path, name: str, command: str, damage: str
) -> None:
    output = Path(shutil.copytree(DATASET, tmp_path / "out"))
    file = output / name
    if damage == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.write_bytes(bytes(file.stat().st_size))
    result = CliRunner().invoke(app, arguments(command, output, tmp_path))
    printed = result.stderr + result.stdout
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit), printed
    assert Path(name).name in printed and "Traceback" not in printed
