"""The runtime environment of remote workers."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from stages.executors.cluster import runtime_env


def test_every_package_of_the_project_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    environment = runtime_env()
    assert environment is not None
    sent = [Path(folder) for folder in environment["py_modules"]]
    project = tomllib.loads(Path("pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {folder.name for folder in sent} == set(packages)
    assert all((folder / "__init__.py").is_file() for folder in sent)


def test_nothing_is_sent_from_inside_a_submitted_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert runtime_env() is None
