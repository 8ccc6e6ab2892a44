"""Environments of their own for the programs that benchmarks compare this project with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def installed(folder: Path, requirements: Sequence[str]) -> Path:
    """Installs packages into the virtual environment `folder`, unless they are there already, from
    pip's configured index and find-links. Returns its interpreter.

    Raises CalledProcessError, with the installer's messages in stderr, if it can't be done.
    """
    uv, python = Path(sys.executable).with_name("uv"), folder / "bin" / "python"
    marker, lines = folder / "installed.txt", "\n".join(requirements)
    if not marker.exists() or marker.read_text() != lines:
        create = [uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder]
        install = [uv, "pip", "install", "--quiet", "--python", python]
        environment = {**os.environ, **_pip_settings()}
        for command in (create, [*install, *requirements]):
            subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        marker.write_text(lines)
    return python


def _pip_settings() -> dict[str, str]:
    """Returns uv's variables for pip's index and find-links, which uv doesn't read. See Makefile,
    which does the same.
    """
    settings = {}
    names = {
        "UV_FIND_LINKS": ("PIP_FIND_LINKS", "find-links"),
        "UV_DEFAULT_INDEX": ("PIP_INDEX_URL", "index-url"),
    }
    for name, (variable, option) in names.items():
        command = [sys.executable, "-m", "pip", "config", "get", f"global.{option}"]
        listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        if value := os.environ.get(name) or os.environ.get(variable) or listed.strip():
            settings[name] = ",".join(value.split()) if option == "find-links" else value
    return settings
