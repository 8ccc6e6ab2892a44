"""Every kind of bad and odd input, each through the real pipeline: it has its reason, and its
neighbours are well.

The corpus is made on the spot, see corpus.py and corpus_rows.py; how each kind is named there is
the list of them.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import SourceError
from pipelines.demo.poison import Expected
from pipelines.ledger import read_ledger
from pipelines.lint import lint
from pipelines.run import plan_job, run
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.pipelines.helpers import NO_COPIES, NO_RULES, config
from tests.pipelines.sources import corpus, corpus_rows
from tests.pipelines.sources.corpus_rows import Rows
from tests.pipelines.sources.server import serving

LEAST_KINDS = 60
# many of these files show the same face, from any side
LENIENT = (*NO_RULES, *NO_COPIES, "rules.max_faces=2")
# MB over the peak of a run on good pictures alone. What may be held at once is the 100 MB of the
# file that grows past max_bytes, and as much again while it is read; the rest is the allocator's. A
# bomb that was unpacked (each holds over 384 MB) or a read without end would go past it.
ALLOWANCE = 300
_RUN = """
import resource, sys
from pipelines.run import run
from tests.pipelines.helpers import config
run(config(sys.argv[1], sys.argv[2], "shard_size=50", *sys.argv[3:]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def faces(portraits: Path) -> corpus.Faces:
    return corpus.load_faces(portraits)


def run_apart(source: Path, output: Path) -> float:
    """The pipeline in a process of its own; the most memory that it held, MB.

    The shell in between: a process begins with the peak of the one that started it, and ours is not
    of interest.
    """
    shell = ["/bin/sh", "-c", '"$@"; exit $?', "sh"]
    command = [*shell, sys.executable, "-c", _RUN, str(source), str(output), *LENIENT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1]) / (1024 if sys.platform == "linux" else 1024**2)


def check(output: Path, expected: dict[str, Expected]) -> str:
    """Every input has its one row with its reason, the ledger balances, every sample is sound; a
    summary.
    """
    store = Store(str(output))
    rows = [
        row
        for index, _ in enumerate(DatasetReader(store).manifests().values())
        for row in DatasetReader(store).rows(index).to_pylist()
    ]
    found = {row["source"]: Expected(row["status"], row["reason"]) for row in rows}
    wrong = {
        name: (said, found.get(name)) for name, said in expected.items() if found.get(name) != said
    }
    summary = (
        f"{len(expected)} kinds, {dict(Counter(said.reason or 'ok' for said in expected.values()))}"
    )
    assert not wrong, f"{summary}; expected, found: {wrong}"
    assert len(rows) == len(found) == len(expected), (
        f"{summary}; not expected: {found.keys() - expected.keys()}"
    )
    vague = [row for row in rows if row["status"] != "ok" and not (row["stage"] and row["detail"])]
    assert all(row["reason"].startswith("http_") for row in vague), (
        f"{summary}; without a detail: {vague}"
    )
    ledger = read_ledger(store)
    assert (
        ledger.inputs
        == len(expected)
        == ledger.written + ledger.dropped.total() + ledger.failed.total()
    ), summary
    assert ledger.written == sum(said.status == "ok" for said in expected.values()), summary
    assert list(lint(store)) == [], summary
    return summary


def test_every_kind_of_file_has_its_reason_in_bounded_memory(
    faces: corpus.Faces, tmp_path: Path
) -> None:
    plain, mixed = tmp_path / "plain", tmp_path / "mixed"
    plain.mkdir()
    mixed.mkdir()
    for case in corpus.good(faces):
        (plain / case.name).write_bytes(case.data)
    expected = corpus.write_files(mixed, faces)
    usual = run_apart(plain, tmp_path / "out plain")
    most = run_apart(mixed, tmp_path / "out mixed")
    summary = check(tmp_path / "out mixed", expected)
    assert len(expected) >= LEAST_KINDS, summary
    assert most < usual + ALLOWANCE, (
        f"{most:.0f} MB, of good pictures alone {usual:.0f} MB; {summary}"
    )
    store = Store(str(tmp_path / "out mixed"))
    records = [
        record
        for index, _ in enumerate(DatasetReader(store).manifests().values())
        for record in DatasetReader(store).records(index)
    ]
    for record in records:
        # where its landmarks lie is the detector's affair
        if record.ok and record.source != "upside down.jpg":
            (left, right), mouth = record.main_face.landmarks[:2], record.main_face.landmarks[3]
            assert left[0] < right[0] and left[1] < mouth[1], f"{record.source} is not upright"


@pytest.mark.parametrize("kind", ["tars", "tables", "fgid", "refused_urls"])
def test_every_kind_of_row_has_its_reason(faces: corpus.Faces, tmp_path: Path, kind: str) -> None:
    _run_rows(getattr(corpus_rows, kind), faces, tmp_path)
    assert not list(tmp_path.rglob("trace")), "code in an embedding was run"


def test_every_kind_of_answer_has_its_reason(faces: corpus.Faces, tmp_path: Path) -> None:
    with serving() as server:
        _run_rows(corpus_rows.served_urls(server), faces, tmp_path)


def _run_rows(
    make: Callable[[Path, corpus.Faces], Rows], faces: corpus.Faces, folder: Path
) -> None:
    (folder / "in").mkdir()
    rows = make(folder / "in", faces)
    run(
        config(
            rows.path,
            folder / "out",
            f"resize.max_bytes={corpus_rows.LIMIT}",
            *LENIENT,
            *rows.settings,
        )
    )
    check(folder / "out", rows.expected)


def test_what_is_no_source_at_all_is_said_before_anything_starts(tmp_path: Path) -> None:
    for name, data, kind, message in corpus_rows.no_sources():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SourceError) as caught:
            plan_job(config(tmp_path / name, tmp_path / "out", f"source.kind={kind}"))
        assert message in str(caught.value), name
    assert not (tmp_path / "out").exists()
