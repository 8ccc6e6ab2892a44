"""Folders and files that the user may not write or read, as another user than root: one line, and
exit status 2.

The process that runs the commands imports and tries everything first, and then becomes another
user: to root, all files are writable, and the other user may not read the installed packages.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipelines.helpers import DEMO, NO_RULES
from tests.pipelines.stub_chain import Scene

SETTINGS = [*NO_RULES, "shard_size=1", "threads=1", "executor=inline"]
NOBODY = 65534

# arguments: a folder; a JSON list of command lines, of which the first ones are run as root
PROGRAM = """
import json, logging, os, shutil, sys
from functools import partial
from pathlib import Path
import pipelines.run
from pipelines.cli import app
from tests.pipelines.stub_chain import stub_chain
from typer.testing import CliRunner

folder, commands = Path(sys.argv[1]), json.loads(sys.argv[2])
pipelines.run.plan_job = partial(pipelines.run.plan_job, chain=stub_chain)
logging.raiseExceptions = False

def call(arguments):
    result = CliRunner().invoke(app, arguments)
    text = result.stdout + result.stderr
    known = result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, text + ("" if known else f"Traceback: {result.exception!r}")

for arguments in commands["root"]:
    code, text = call(arguments)
    assert code == 0, text
for path in sorted(folder.rglob("*"), reverse=True):
    path.chmod(0o555 if path.is_dir() else 0o444)
folder.chmod(0o555)
for name in commands["unreadable"]:
    (folder / name).chmod(0)
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(commands["user"])
    os.setuid(commands["user"])
print(json.dumps([call(arguments) for arguments in commands["user_commands"]]))
"""


def run(source: Path, output: Path, *more: str) -> list[str]:
    return ["run", "-c", DEMO, f"source.path={source}", f"output={output}", *SETTINGS, *more]


def removal(output: Path) -> list[str]:
    return ["takedown", str(output), "--source", "ann.jpg", "--yes"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Name of each case → exit status and output."""
    folder = tmp_path_factory.mktemp("permissions")
    for path in (folder, *folder.parents[:3]):  # other users may look for names in it
        if path.owner() == Path.home().owner():
            path.chmod(path.stat().st_mode | 0o011)
    source, whole, cut = folder / "source", folder / "whole", folder / "cut"
    source.mkdir()
    for name in ("ann", "bob"):
        (source / f"{name}.jpg").write_bytes(Scene(person=name).encode())
    cases = {
        "new output": run(source, folder / "new"),
        "run": run(source, whole, "caption.llava.prompt=Who?"),
        "report": ["report", str(whole)],
        "takedown": [*removal(whole), "--page", str(folder / "page.html")],
        "export": ["export-json", str(whole), str(folder / "exported")],
        "png": ["inspect", str(whole), "ann.jpg", "--png", str(folder / "ann.png")],
        "synthesize": ["synthesize", str(folder / "portraits"), "--count", "1"],
        "cache": ["weights", "-c", DEMO, f"weights.cache={folder / 'cache'}"],
        "unreadable tar": ["inspect", str(cut), "ann.jpg"],
        "lint": ["lint", str(cut)],
        "unreadable sidecar": ["inspect", str(cut), "bob.jpg"],
    }
    trial = folder / "trial"
    commands = {
        "root": [
            run(source, trial),
            run(source, whole),
            run(source, cut),
            ["report", str(trial)],
            ["export-json", str(trial), str(trial / "exported")],
            ["inspect", str(trial), "ann.jpg", "--png", str(trial / "a.png")],
            ["lint", str(trial)],
            *([*removal(trial), "--page", str(trial / "page.html")] for _ in range(2)),
        ],
        "unreadable": ["cut/shards/fgid-000000.tar", "cut/shards/fgid-000001.parquet"],
        "user": NOBODY,
        "user_commands": [*cases.values()],
    }
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), json.dumps(commands)],
        capture_output=True,
        text=True,
    )
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o700)
    assert process.returncode == 0, process.stderr
    return dict(zip(cases, json.loads(process.stdout.splitlines()[-1]), strict=True))


CASES = {
    "new output": "new/run.lock",
    "run": "whole/run.lock",
    "report": "whole/report/stats.json",
    "takedown": "page.html",
    "export": "/exported",
    "png": "ann.png",
    "synthesize": "/portraits",
    "cache": "weights.cache=FOLDER",
    "unreadable tar": "fgid-000000.tar",
    "unreadable sidecar": "fgid-000001.parquet",
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_the_user_may_not_use_is_an_error_in_one_line(
    results: dict[str, tuple[int, str]], case: str
) -> None:
    status, text = results[case]
    [line] = [line for line in text.splitlines() if line.startswith("error: ")]
    assert status == 2 and text.splitlines()[-1] == line and "Traceback" not in text
    assert CASES[case] in line and "ermission" in line and "keys" not in line


def test_lint_names_unreadable_files_and_goes_on(results: dict[str, tuple[int, str]]) -> None:
    status, text = results["lint"]
    lines = text.splitlines()
    assert status == 1 and lines[-1] == "2 shards checked, 2 faults", text
    assert "fgid-000000.tar can't be read: Permission denied" in lines[0]
    assert "fgid-000001.parquet can't be read" in lines[1]
