"""Records in a child process: equal results, and a record that kills the process fails alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import PipelineError
from configs.load import load_text, to_yaml
from configs.schema import DatasetConfig
from stages.base import Stage, run_chain
from stages.chain import build_stages
from stages.executors.isolate import Child, run_isolated
from stages.executors.job import ChainReference
from stages.record import Record, key_of

NAMES = ("resize", "detect")
TRAP = ChainReference("tests.stages.executors.traps:trap_alone", "")
TRAPPED = frozenset({"trap"})


def real_stages(text: str) -> list[Stage]:
    """Returns the stages of a data set configuration in YAML."""
    return build_stages(load_text(DatasetConfig, text))


def named(name: str) -> Record:
    return Record(key=key_of(name), source=name)


def test_results_in_a_child_process_equal_those_in_this_process(portraits: Path) -> None:
    chain = ChainReference(f"{__name__}:real_stages", to_yaml(DatasetConfig()))
    files = sorted(portraits.iterdir())[:2]
    records = [
        Record(key=key_of(path.name), source=path.name, image=path.read_bytes()) for path in files
    ]
    expected = run_chain(chain.build()[:2], records)
    advanced: list[int] = []
    needs = [frozenset({"resize", "detect", "parse"})] * 2
    with Child(chain, NAMES, threads=1, stuck_after=600.0) as child:
        results = run_isolated(child, records, needs, advanced.append)
    assert all(record.image and record.faces for record in results)
    assert [(r.image, r.faces) for r in results] == [(r.image, r.faces) for r in expected]
    assert advanced == [1, 1]


def test_a_record_that_needs_no_stage_starts_no_process() -> None:
    record = named("a")
    with Child(TRAP, ["trap"], threads=1, stuck_after=600.0) as child:
        assert child.run(record, frozenset({"detect"})) is record and child.pid == 0


def dies_before(child: Child) -> Record:
    os.kill(child.pid, signal.SIGSEGV)
    return child.run(named("second"), TRAPPED)


def dies_of(child: Child) -> Record:
    return child.run(named("killer"), TRAPPED)


@pytest.mark.parametrize("end", [dies_before, dies_of])
def test_a_record_whose_process_dies_fails_and_the_next_does_not(
    end: Callable[[Child], Record],
) -> None:
    with Child(TRAP, ["trap"], threads=1, stuck_after=600.0) as child:
        assert child.run(named("first"), TRAPPED).ok
        killed = end(child)
        assert (killed.status, killed.reason, killed.stage) == ("failed", "killed_worker", "trap")
        assert f"signal {signal.SIGSEGV:d}" in killed.detail
        assert child.run(named("third"), TRAPPED).ok


def test_a_record_that_takes_too_long_fails_and_its_process_is_killed() -> None:
    with Child(TRAP, ["trap"], threads=1, stuck_after=0.2) as child:
        late = child.run(named("sleeper"), TRAPPED)
        assert (late.reason, late.stage, late.detail) == ("timed_out", "trap", "no answer in 0.2 s")
        assert child.pid == 0


def test_an_error_that_is_not_the_records_fault_ends_the_run() -> None:
    with Child(TRAP, ["trap"], threads=1, stuck_after=600.0) as child:
        assert child.run(named("first"), TRAPPED).ok
        with pytest.raises(PipelineError, match="no server"):
            child.run(named("serverless"), TRAPPED)
