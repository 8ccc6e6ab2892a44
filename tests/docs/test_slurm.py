"""docs/cluster/train.sbatch, with stubs of Slurm's programs: `srun` starts two processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs/cluster/train.sbatch"
STUBS = {
    # passes SIGTERM on to both processes, and exits with the highest status
    "srun": """shift
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & pids+=" $!"; done
trap 'kill -TERM $pids' TERM
highest=0
for pid in $pids; do
    while true; do wait $pid; code=$?; kill -0 $pid 2>/dev/null || break; done
    ((code > highest)) && highest=$code
done
exit $highest
""",
    "scontrol": """[ "$1" = show ] && printf 'node-7\\nnode-8\\n' || echo "$@" >> scontrol.log
""",
    # in the place of python: it ends with the status in the file `code`, or with 143 at SIGTERM
    "python": """trap 'exit 143' TERM
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT: $*" > rank-$RANK
while [ ! -e code ]; do sleep 0.02; done
exit $(cat code)
""",
}


@pytest.fixture
def job(tmp_path: Path) -> subprocess.Popen[str]:
    """The script, when both processes have started."""
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "python"),
        "SLURM_JOB_ID": "40001",
        "SLURM_JOB_NODELIST": "node-[7-8]",
        "SLURM_NTASKS": "2",
    }
    process = subprocess.Popen(
        ["bash", str(SCRIPT), "data=a b", "output=out"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 30
    while not all((tmp_path / f"rank-{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < end
        time.sleep(0.02)
    return process


def requeued(folder: Path) -> list[str]:
    log = folder / "scontrol.log"
    return log.read_text().splitlines() if log.exists() else []


def test_each_process_gets_its_rank_and_the_address_of_the_first_node(
    job: subprocess.Popen[str], tmp_path: Path
) -> None:
    (tmp_path / "code").write_text("0")
    assert job.wait(30) == 0 and requeued(tmp_path) == []
    for rank in (0, 1):
        line = (tmp_path / f"rank-{rank}").read_text().strip()
        expected = f"{rank} {rank} 2 node-7 20001: -m train.cli run data=a b output=out"
        assert line == expected


def test_when_the_time_is_up_all_processes_get_sigterm_and_the_job_is_queued_again(
    job: subprocess.Popen[str], tmp_path: Path
) -> None:
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 143
    assert requeued(tmp_path) == ["requeue 40001"]


@pytest.mark.parametrize("code", ["0", "2"])
def test_a_run_that_ends_by_itself_is_not_queued_again(
    job: subprocess.Popen[str], tmp_path: Path, code: str
) -> None:
    (tmp_path / "code").write_text(code)
    assert job.wait(30) == int(code) and requeued(tmp_path) == []


def test_a_cancelled_job_stops_with_a_checkpoint_and_is_not_queued_again(
    job: subprocess.Popen[str], tmp_path: Path
) -> None:
    job.terminate()
    assert job.wait(30) == 143 and requeued(tmp_path) == []
