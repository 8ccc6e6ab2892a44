"""A process ends with its owner, and so does all that it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from stages.executors.owned import OwnedProcess
from tests.pipelines.fleet import wait_until

# ignores SIGTERM, as its child does
STUBBORN = "trap '' TERM; sleep 60 & echo $$ $!; wait; wait"


def pids_in(path: Path) -> list[int]:
    """Waits until a file has a line of process ids, and returns them."""
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"))
    return [int(word) for word in path.read_text().split()]


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def members(group: int) -> set[int]:
    """Returns the processes of a process group."""
    return {pid for pid in psutil.pids() if runs(pid) and os.getpgid(pid) == group}


def test_it_ends_when_its_owner_is_killed(tmp_path: Path) -> None:
    output = tmp_path / "pids"
    script = (
        "import sys, time; from stages.executors.owned import OwnedProcess\n"
        "output = open(sys.argv[1], 'wb')\n"
        "process = OwnedProcess(['sh', '-c', sys.argv[2]], output=output)\n"
        "time.sleep(1000)"
    )
    owner = subprocess.Popen([sys.executable, "-c", script, str(output), STUBBORN])
    pids = pids_in(output)
    assert len(pids) == 2 and all(runs(pid) for pid in pids)
    owner.kill()
    owner.wait()
    wait_until(lambda: not any(runs(pid) for pid in pids))


def test_end_kills_what_ignores_sigterm_and_what_the_command_has_started(tmp_path: Path) -> None:
    with (tmp_path / "pids").open("wb") as output:
        process = OwnedProcess(["sh", "-c", STUBBORN], output=output)
    pids = pids_in(tmp_path / "pids")
    assert process.poll() is None and pids[0] == process.pid
    (watcher,) = members(process.pid) - set(pids)
    os.kill(watcher, signal.SIGKILL)  # `end` doesn't need it
    assert process.end(grace=0.1) == -signal.SIGKILL
    wait_until(lambda: not any(runs(pid) for pid in pids))
    assert process.end(grace=0.1) == -signal.SIGKILL, "the second call does nothing"


def test_what_a_finished_command_has_started_ends_too(tmp_path: Path) -> None:
    with (tmp_path / "pids").open("wb") as output:
        process = OwnedProcess(["sh", "-c", "sleep 60 & echo $!; exit 4"], output=output)
    pids = pids_in(tmp_path / "pids")
    wait_until(lambda: process.poll() is not None)
    assert process.end(grace=10) == 4
    wait_until(lambda: not any(runs(pid) for pid in pids))


def test_a_command_that_does_not_exist_has_the_exit_status_of_a_shell(tmp_path: Path) -> None:
    with (tmp_path / "errors").open("wb") as output:
        process = OwnedProcess(["no-such-program"], output=output)
    wait_until(lambda: process.poll() is not None)
    assert process.end(grace=10) == 127
    text = (tmp_path / "errors").read_text()
    assert text == "no-such-program can't be started: No such file or directory\n"
