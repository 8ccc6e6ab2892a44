"""The CPU time of each test file, against its budget in tests/budget.toml.

A pytest plugin. CPU time of the process and of the child processes that it has waited for, since
wall time says little on a busy machine; processes that outlive their parent, such as Ray's workers,
aren't seen. Fixtures of scope `session` count as files of their own. Under pytest-xdist files are
run in the order of their budgets, the largest first.

TEST_BUDGET=2 in the environment doubles the budgets, TEST_BUDGET=0 switches them off.
"""

from __future__ import annotations

import os
import resource
import time
import tomllib
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any, Final

import pytest

_BUDGET: Final = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
_TIMES: Final = float(os.environ.get("TEST_BUDGET", "1"))

_used: Counter[str] = Counter()  # in the process that reports: seconds by file or fixture
_spent: dict[str, float] = {}  # in a process that runs tests: since the last report
_clock, _running = 0.0, ""  # the file of the running test


def allowed(name: str) -> float:
    """Seconds of CPU time that the test file or session fixture `name` may take."""
    return float(_BUDGET["seconds"].get(name, _BUDGET["default"])) * _BUDGET["margin"] * _TIMES


def over(used: dict[str, float]) -> list[str]:
    """A line for each file or fixture over its budget, the worst first."""
    late = sorted((allowed(name) - seconds, name) for name, seconds in used.items())
    return [
        f"{name}: {used[name]:.1f} s of CPU time, {allowed(name):.1f} s allowed"
        for left, name in late
        if left < 0
    ]


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _charge(name: str) -> None:
    """Charge the time since the last call to `name`."""
    global _clock
    now = _cpu()
    _spent[name] = _spent.get(name, 0.0) + now - _clock
    _clock = now


def _file(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    global _clock, _running
    _clock, _running = _cpu(), _file(item)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any) -> Generator[None, Any, Any]:
    _charge(_running)
    try:
        return (yield)
    finally:
        _charge(_owner(fixturedef))


def pytest_fixture_post_finalizer(fixturedef: Any) -> None:
    _charge(_owner(fixturedef))


def _owner(fixturedef: Any) -> str:
    shared = fixturedef.scope == "session"
    return f"fixture {fixturedef.argname}" if shared else _running


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    report = yield
    _charge(_running)
    report.cpu_seconds = dict(_spent)
    _spent.clear()
    return report


def pytest_runtest_logreport(report: Any) -> None:
    _used.update(getattr(report, "cpu_seconds", {}))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: -allowed(_file(item)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _TIMES and over(_used) and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    total = f"{sum(_used.values()):.0f} s of CPU time in tests and shared fixtures"
    terminalreporter.write_line(total)
    if terminalreporter.config.option.verbose > 0:
        for name, seconds in _used.most_common():
            terminalreporter.write_line(f"{seconds:8.1f} s of {allowed(name):6.1f} s  {name}")
    if not _TIMES:
        return
    for line in over(_used):
        terminalreporter.write_line(f"over budget: {line}", red=True)
    if over(_used):
        terminalreporter.write_line(
            "Make the tests of these files cheaper, or raise their budgets in tests/budget.toml "
            "and say why. On a slow machine, TEST_BUDGET=2 doubles all budgets."
        )
