"""Damaged data sets: every command on every kind of damaged file.

A command that reads the file ends with one line, which names the file and a command that helps;
others succeed. `run` makes what can be made again, and the data set is then as it was. `infer` is
missing here: it reads no data set.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
import typer
from typer.testing import CliRunner

import pipelines.run
from configs.errors import PipelineError, ShardError
from pipelines.cli import app
from pipelines.cli.common import errors
from pipelines.run import execute, plan_job
from pipelines.takedown import by_source, take_down
from stages.storage.layout import (
    CONFIG,
    DATASET,
    DUPLICATES,
    IDENTITIES,
    PLAN,
    TAKEDOWNS,
)
from stages.storage.samples import TarWriter
from stages.storage.store import Store
from tests.pipelines.helpers import DEMO, NO_RULES, config, digests, zero_images
from tests.pipelines.stub_chain import Scene, stub_chain
from train.shards import ShardSet

SCENES: Final = {
    "a.jpg": Scene(person="ann"),
    "b.jpg": Scene(person="ann", saved=1),  # quarantined as a near duplicate
    "c.jpg": Scene(person="bob"),  # taken down
    "d.jpg": Scene(person=""),  # no face
    "e.jpg": Scene(person="eva"),
    "f.jpg": Scene(person="fay"),
}
SETTINGS: Final = (*NO_RULES, "shard_size=4", "threads=1", "executor=inline")
TAR: Final = "shards/fgid-000000.tar"
QUARANTINE: Final = "shards/fgid-000000.quarantine.tar"
SIDECAR: Final = "shards/fgid-000000.parquet"
MANIFEST: Final = "shards/fgid-000000.json"

COMMANDS: Final = (
    *("lint", "lint-fast", "status", "info", "inspect", "inspect-quarantined", "export-json"),
    *("train", "report", "takedown", "run", "retry"),
)
CHANGING: Final = ("takedown", "run", "retry")  # each gets a damaged data set of its own


def missing(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    """Cuts a file in the middle, but not after a line: what is left of a YAML would be valid."""
    half = path.read_bytes()[: path.stat().st_size // 2]
    os.truncate(path, len(half.rstrip(b"\n")))


def overwritten(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


DAMAGES: Final = (missing, truncated, overwritten)
_NEEDS_TAR: Final = "lint lint-fast inspect export-json train takedown run retry"
_NEEDS_QUARANTINE: Final = "lint lint-fast inspect-quarantined takedown run retry"
_NEEDS_ROWS: Final = (
    "lint lint-fast inspect inspect-quarantined export-json train report takedown run retry"
)
_NEEDS_IDENTITIES: Final = "lint lint-fast inspect inspect-quarantined train report"
_NEEDS_LOG: Final = "lint lint-fast report takedown run retry"
_NEEDS_CONFIG: Final = "lint lint-fast inspect inspect-quarantined report takedown retry"
_NEEDS_INFO: Final = "lint lint-fast info inspect inspect-quarantined report takedown"
_NEEDS_PLAN: Final = "lint lint-fast status report takedown run retry"

# file → the commands that end with its name, for each damage; all others succeed.
# Sizes say nothing of a file that was overwritten: `lint` finds it, and whoever reads it. `run`
# doesn't read a shard that isn't pending, apart from the report's sidecars.
TABLE: Final[dict[str, tuple[str, str, str]]] = {
    TAR: (_NEEDS_TAR, _NEEDS_TAR, "lint inspect export-json train takedown retry"),
    QUARANTINE: (
        _NEEDS_QUARANTINE,
        _NEEDS_QUARANTINE,
        "lint inspect-quarantined takedown retry",
    ),
    SIDECAR: (_NEEDS_ROWS, _NEEDS_ROWS, _NEEDS_ROWS.replace("lint-fast ", "")),
    # Without its manifest, the shard doesn't exist: the trainer doesn't see it, other commands
    # print a note. `run` makes it again.
    MANIFEST: (
        "lint lint-fast inspect inspect-quarantined takedown retry",
        f"{_NEEDS_ROWS} status",
        f"{_NEEDS_ROWS} status",
    ),
    # Made again by `run`, `retry` and take-downs.
    IDENTITIES: ("lint lint-fast train", _NEEDS_IDENTITIES, _NEEDS_IDENTITIES),
    # Take-downs look for copies in it. A damaged one is made again once it is removed.
    DUPLICATES: (
        "lint lint-fast takedown",
        "lint lint-fast takedown run retry",
        "lint lint-fast takedown run retry",
    ),
    PLAN: ("lint lint-fast status takedown", _NEEDS_PLAN, _NEEDS_PLAN),
    CONFIG: ("lint lint-fast takedown retry", _NEEDS_CONFIG, _NEEDS_CONFIG),
    DATASET: ("lint lint-fast info", _NEEDS_INFO, _NEEDS_INFO),
    TAKEDOWNS: (_NEEDS_LOG, _NEEDS_LOG, _NEEDS_LOG),
}

trainer = typer.Typer()


@trainer.command()
def read_for_training(data: str) -> None:
    """Reads what `train` reads of a data set; ends with the error that it lists for a sample."""
    with errors():
        shards = ShardSet(data, "train")
        for record in shards.records(range(len(shards))):
            if isinstance(record, ShardError):
                raise record
        shards.dataset_config()


def call(command: str, output: Path) -> tuple[int, str]:
    """Returns the exit status, and all that was printed."""
    out, source = str(output), output.with_name("source")
    exported = output.with_name("exported")
    arguments = {
        "lint-fast": ["lint", out, "--fast"],
        "inspect": ["inspect", out, "a.jpg", "--no-image"],
        "inspect-quarantined": ["inspect", out, "b.jpg", "--no-image"],
        "export-json": ["export-json", out, str(exported), "--overwrite"],
        "train": [out],
        "takedown": ["takedown", out, "--source", "a.jpg", "--yes"],
        "run": ["run", "-c", DEMO, f"source.path={source}", f"output={out}", *SETTINGS],
        "retry": ["retry", out, "--reason", "no_face"],
    }.get(command, [command, out])
    result = CliRunner().invoke(trainer if command == "train" else app, arguments)
    text = result.stdout + result.stderr
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        text += f"Traceback: {result.exception!r}"
    return result.exit_code, text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `source`, and `whole`, its data set. Runs have stages that need no model."""
    folder = tmp_path_factory.mktemp("damage")
    (folder / "source").mkdir()
    for name, scene in SCENES.items():
        (folder / "source" / name).write_bytes(scene.encode())

    def plan(
        settings: object, retry: frozenset[str] = frozenset(), *, repair: bool = False
    ) -> pipelines.run.Job:
        return plan_job(settings, retry, stub_chain, repair=repair)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.run, "plan_job", plan)
        output = folder / "out"
        assert call("run", output)[0] == 0
        store, settings = Store(str(output)), config(folder / "source", output, *SETTINGS)
        take_down(store, settings, by_source(store, "c.jpg"), "source", "", stub_chain)
        output.rename(folder / "whole")
        yield folder


def damaged(folder: Path, name: str, damage: Callable[[Path], None]) -> Path:
    """Returns a copy of the data set with a damaged file, where the data set was made."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    output = Path(shutil.copytree(folder / "whole", folder / "out"))
    damage(output / name)
    return output


def problem(name: str, names_it: bool, command: str, status: int, text: str) -> str:
    """Returns how a command's result differs from the expected one; "": not at all."""
    if "Traceback" in text:
        return "traceback"
    helps = any(word in text for word in ("run ", "Run ", "`run`", "restore", "Restore"))
    if names_it and not (status in (1, 2) and Path(name).name in text and helps):
        return "the file or a command that helps is not named"
    if names_it and command.startswith("lint"):
        return "" if "shards checked" in text else "lint doesn't go on"
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    return "" if len(lines) == int(names_it) and (status == 0) != names_it else "wrong status"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", TABLE)
def test_a_command_on_a_damaged_data_set_names_the_file_or_succeeds(
    folder: Path, name: str, damage: Callable[[Path], None]
) -> None:
    naming = TABLE[name][DAMAGES.index(damage)].split()
    assert {*naming} <= {*COMMANDS}
    problems = {}
    for command in COMMANDS:
        if command in CHANGING or command == COMMANDS[0]:
            output = damaged(folder, name, damage)
        status, text = call(command, output)
        if what := problem(name, command in naming, command, status, text):
            problems[command] = what, status, text
        if "nothing to do" in text and (damage is not overwritten or "shards" not in name):
            problems[command] = "nothing to do", status, text
        if command == "run" and status == 0 and damage is not overwritten:
            assert digests(output) == digests(folder / "whole")
            assert call("lint", output)[0] == 0
    assert problems == {}


@pytest.mark.parametrize("name", [TAR, QUARANTINE])
def test_lint_names_each_damaged_sample_and_goes_on(folder: Path, name: str) -> None:
    def scratch(path: Path) -> None:
        with tarfile.open(path) as tar:
            members = [member for member in tar if member.name.endswith((".json", ".npy"))]
        with path.open("r+b") as stream:
            for member in members[:2]:
                stream.seek(member.offset_data)
                stream.write(b"\xff" * 8)

    output = damaged(folder, name, scratch)
    (output / "shards/fgid-000001.parquet").unlink()
    status, text = call("lint", output)
    lines = text.splitlines()
    assert status == 1 and lines[-1] == "2 shards checked, 3 faults"
    assert f"{Path(name).name} is not the file that was committed" in text
    assert [line for line in lines if "can't be read" in line and Path(name).name in line]
    assert [line for line in lines if "fgid-000001.parquet is missing" in line]


Samples = dict[str, dict[str, bytes]]  # key → extension → bytes, in the tar's order


def one_less(samples: Samples) -> None:
    samples.popitem()


def one_more(samples: Samples) -> None:
    first, *_ = samples.values()
    key = "0" * 20
    meta = json.loads(first["json"]) | {"key": key}
    samples[key] = {**first, "json": json.dumps(meta).encode()}


def in_another_order(samples: Samples) -> None:
    first = next(iter(samples))
    samples[first] = samples.pop(first)


def with_another_caption(samples: Samples) -> None:
    members = next(iter(samples.values()))
    meta = json.loads(members["json"]) | {"caption": "another"}
    members["json"] = json.dumps(meta).encode()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (one_less, "has a row, but isn't in the tar"),
        (one_more, "sample 00000000000000000000 is in the tar, but has no row there"),
        (in_another_order, "differs from its row: its place in the tar"),
        (with_another_caption, "differs from its row: caption"),
    ],
)
def test_lint_compares_tar_and_rows_also_where_the_digest_is_right(
    folder: Path, change: Callable[[Samples], None], fault: str
) -> None:
    def rewrite(path: Path) -> None:
        samples: Samples = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                stream = tar.extractfile(member)
                assert stream is not None
                samples.setdefault(key, {})[extension] = stream.read()
        change(samples)
        with path.open("wb") as stream:
            writer = TarWriter(stream)
            for key, members in samples.items():
                writer.add(key, members)
            writer.finish()
        data, manifest = path.read_bytes(), path.with_suffix(".json")
        values = json.loads(manifest.read_text())
        values["tar"] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest.write_text(json.dumps(values))

    output = damaged(folder, "shards/fgid-000001.tar", rewrite)
    status, text = call("lint", output)
    assert status == 1 and "fgid-000001.tar: " in text and fault in text, text
    assert "is not the file" not in text and call("lint-fast", output)[0] == 0


def test_lint_finds_files_of_no_shard_and_manifests_of_another(folder: Path) -> None:
    output = damaged(folder, MANIFEST, lambda path: None)
    (output / "shards/notes.txt").write_text("mine")
    (output / "shards/fgid-000000.held.tar").write_bytes(b"")
    shutil.copy(output / MANIFEST, output / "shards/fgid-000007.json")
    for command in ("lint", "lint-fast"):
        status, text = call(command, output)
        assert status == 1 and text.count("\n") == 4, text
        assert "shards/notes.txt belongs to no shard" in text
        assert "shards/fgid-000000.held.tar belongs to no shard" in text
        assert "fgid-000007.json is the manifest of fgid-000000" in text


def test_a_single_wrong_byte_in_the_configuration_is_a_fault(folder: Path) -> None:
    def change(path: Path) -> None:
        path.write_bytes(path.read_bytes().replace(b"g", b"\xff", 1))

    output = damaged(folder, CONFIG, change)
    status, text = call("lint-fast", output)
    assert status == 1 and "config.yaml is damaged: it isn't UTF-8 text" in text


def test_an_export_with_colours_names_the_tar_of_a_damaged_image(folder: Path) -> None:
    output = damaged(folder, TAR, zero_images)
    arguments = ["export-json", str(output), str(folder / "colours"), "--color"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and TAR in result.stderr and "run" in result.stderr


def test_a_run_with_the_removal_log_restored_continues(folder: Path) -> None:
    output = damaged(folder, TAKEDOWNS, missing)
    settings = config(folder / "source", output, *SETTINGS)
    with pytest.raises(PipelineError, match=r"takedown\.jsonl is missing"):
        plan_job(settings, chain=stub_chain)
    shutil.copy(folder / "whole" / TAKEDOWNS, output)
    assert list(execute(plan_job(settings, chain=stub_chain), lambda count: None)) == []
