"""What only a GPU can show, in a few minutes: `make gpu-check`.

    python -m bench.gpu_check --output gpu.json

Each check (`bench/gpu`) runs in a process of its own: rates of the device; models of the
chain, a training step and short trainings on the GPU against the CPU, within stated tolerances;
trainings resumed to the same bytes; `bench.train` and `bench.inference` at full size with random
weights. Needed are this folder and Python 3.11 or newer with torch; nothing is installed or
downloaded. A check that lacks a package or weights says so in its row, and the others go on.

Writes the JSON file, which also has all that a failed check wrote to standard error, and beside it
a table in Markdown. Exit status: 0 if no check failed, 1 if one did, 2 without a GPU or with an
older Python.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - an older one can't import the modules below
    version = ".".join(map(str, sys.version_info[:3]))
    print(
        f"Python {version} is too old: 3.11 or newer is needed. Choose another, as with "
        "`make gpu-check PYTHON=python3.11`.",
        file=sys.stderr,
    )
    raise SystemExit(2)

import argparse
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu.checks import CHECKS, measured
from bench.gpu.common import DETAILS, Setting

_LINES = 3  # of a process's errors, in its row


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all checks and writes what they measured; returns the exit status. arguments: of the
    command line; None for those of this process.
    """
    options = _options(arguments)
    output, folder, device, tiny = options.output, options.folder, options.device, options.tiny
    names = options.only or list(CHECKS)
    setting = Setting(device=device, tiny=tiny, folder=folder)
    if options.one:
        try:
            print(json.dumps(measured(options.one, setting)))
        except subprocess.CalledProcessError as error:
            # no traceback: before this line stands what the command wrote, with the cause
            print(error, file=sys.stderr)
            return 1
        return 0
    if problem := no_gpu() if device == "cuda" else "":
        print(f"no GPU: {problem}", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        began = time.monotonic()
        rows[name] = in_process(name, setting)
        rows[name]["seconds"] = round(time.monotonic() - began, 1)
        row = rows[name]
        print(f"{name}: {row['status']} in {row['seconds']} s {row['detail']}", flush=True)
        output.write_text(json.dumps(rows, indent=1) + "\n")
    text = table(rows)
    output.with_suffix(".md").write_text(text)
    print(text)
    return int(any(row["status"] == "failed" for row in rows.values()))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("gpu.json"), help="JSON file of all values")
    folder = Path("runs/gpu-check")
    add("--folder", type=Path, default=folder, help="for data, models and outputs")
    add("--only", action="append", choices=[*CHECKS], help="a check; may repeat")
    add("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: try the checks themselves")
    add("--tiny", action="store_true", help="small sizes, for a CPU")
    add("--one", default="", help=argparse.SUPPRESS)  # in a process of its own
    return parser.parse_args(arguments)


def no_gpu() -> str:
    """Returns why CUDA can't be used here, or nothing."""
    try:
        import torch
    except ImportError:
        return "torch isn't installed for this Python. Install it, or choose another PYTHON."
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA. Try: make install GPU=1"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no device. Does nvidia-smi list one?"
    return ""


def in_process(name: str, setting: Setting) -> dict[str, Any]:
    """Runs a check in a new process; returns its row."""
    command = [sys.executable, "-m", "bench.gpu_check", "--one", name, "--device", setting.device]
    command += ["--folder", str(setting.folder), *(["--tiny"] if setting.tiny else [])]
    limit = CHECKS[name].seconds
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=limit)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            if isinstance(error, KeyboardInterrupt):
                raise
            errors = process.communicate()[1]
            row = {"status": "failed", "detail": f"stopped after {limit} s", "values": {}}
        else:
            row = row_of(output, errors, process.returncode)
    return {**row, "errors": errors} if row["status"] == "failed" else row


def row_of(output: str, errors: str, status: int) -> dict[str, Any]:
    """Returns the row that a process printed last, or else one with the end of its errors."""
    try:
        row: dict[str, Any] = json.loads(output.splitlines()[-1])
    except (IndexError, ValueError):
        last = errors.strip().splitlines()[-_LINES:]
        for line in last:
            if line.startswith(ModuleNotFoundError.__name__):
                return {"status": "missing", "detail": line, "values": {}}
        detail = f"exit {status}: {' | '.join(last)}"
        return {"status": "failed", "detail": detail, "values": {}}
    return row


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Returns a table in Markdown, with a line for each check."""
    lines = ["| check | result | seconds | values |", "| --- | --- | --- | --- |"]
    for name, row in rows.items():
        result = f"{row['status']}: {row['detail']}" if row["detail"] else row["status"]
        values = ", ".join(flat(row["values"]))
        cells = (cell.replace("|", "\\|").replace("\n", " ") for cell in (result, values))
        shown, measured_values = cells
        lines.append(f"| {name} | {shown} | {row['seconds']} | {measured_values} |")
    return "\n".join(lines) + "\n"


def flat(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Returns `name value` of all values, with the names of nested ones joined by dots."""
    texts: list[str] = []
    for name, value in values.items():
        if name == DETAILS:
            continue
        if isinstance(value, dict):
            texts += flat(value, f"{prefix}{name}.")
        else:
            texts.append(f"{prefix}{name} {value}")
    return texts


if __name__ == "__main__":
    raise SystemExit(main())
