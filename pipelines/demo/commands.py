"""Running the project's own commands one after another, as a user would type them."""

from __future__ import annotations

import subprocess
import sys

import typer


def print_step(number: int, total: int, text: str) -> None:
    typer.secho(f"\n[{number}/{total}] {text}", bold=True)


def run_command(module: str, command: str, *arguments: str) -> None:
    """Run `python -m MODULE`; exits with its code if it fails.

    module, command: with arguments separated by spaces. arguments: more of them, which may contain
    spaces.
    """
    full_command = [sys.executable, "-m", *module.split(), *command.split(), *arguments]
    returncode = subprocess.run(full_command, check=False).returncode
    if returncode:
        raise typer.Exit(returncode)
