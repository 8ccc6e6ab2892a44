"""Rejects vague names of variables, arguments, attributes, functions and classes.

Run as `python -m tests.names`, part of `make lint`. Only definitions are checked, so that names of
libraries can be imported and called.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.sizes import FOLDERS

PARTICIPLES = frozenset(["found", "given", "got", "held", "kept", "known", "made", "said", "told"])
FILLERS = frozenset(["facts", "misc", "stuff", "thing", "things", "todo", "todos"])
_NUMBERED = re.compile(r"(data|item|list|obj|object|out|res|result|temp|tmp|val|value|var)_?\d+")


def advice(name: str) -> str:
    """Returns why a name is vague and what to do; "" for a name that isn't."""
    word = name.strip("_").lower()
    if word in PARTICIPLES:
        return "says where the value came from, not what it is; name its contents (rows, matches)"
    if word in FILLERS:
        return "fits any value; say which (provenance, run_info, remaining_stages)"
    if _NUMBERED.fullmatch(word):
        return "its number says nothing; name what distinguishes it (before and after)"
    return ""


def definitions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields the line and the name of everything that a module defines or assigns."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.arg(arg=name) | ast.ExceptHandler(name=str(name)):
                yield node.lineno, name
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.lineno, node.name


def faults(root: Path) -> Iterator[str]:
    """Yields a line for each vague name."""
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            for line, name in definitions(ast.parse(path.read_text(encoding="utf-8"))):
                if reason := advice(name):
                    yield f"{path.relative_to(root)}:{line} {name}: {reason}"


if __name__ == "__main__":
    lines = list(faults(Path()))
    print("\n".join(lines) or "no vague names")
    sys.exit(bool(lines))
