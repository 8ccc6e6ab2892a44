"""Rejects files over 400 lines and functions over 80: `python -m tests.sizes`, in `make lint`."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FILE, FUNCTION = 400, 80
FOLDERS = ("configs", "stages", "model", "pipelines", "train", "infer", "tests", "bench")


def faults(root: Path) -> Iterator[str]:
    """Yields a line for each file and each function that is too long."""
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            lines = text.count("\n")
            if lines > FILE:
                yield f"{path}: {lines} lines, at most {FILE}"
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    length = (node.end_lineno or node.lineno) - node.lineno + 1
                    if length > FUNCTION:
                        where = f"{path}:{node.lineno} {node.name}"
                        yield f"{where}: {length} lines, at most {FUNCTION}"


if __name__ == "__main__":
    lines = list(faults(Path()))
    print("\n".join(lines) or f"no file over {FILE} lines, no function over {FUNCTION}")
    sys.exit(bool(lines))
