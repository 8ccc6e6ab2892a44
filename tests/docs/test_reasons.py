"""docs/reasons.md is up to date, and its table has exactly the reasons that the code uses."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from stages.reasons import REASONS, explain
from tests.docs.__main__ import PAGE, reasons_page

ROOT = Path(__file__).parents[2]
FOLDERS = ("stages", "model", "pipelines", "train", "infer")
TABLE = ROOT / "stages" / "reasons.py"


@pytest.fixture(scope="module")
def nodes() -> list[ast.AST]:
    """All nodes of the shipped code except the table of reasons."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in paths if path != TABLE)
    return [node for tree in trees for node in ast.walk(tree)]


def parameters(node: ast.AST) -> list[str]:
    """Returns the names of the parameters of a function or a class."""
    if isinstance(node, ast.FunctionDef):
        return [argument.arg for argument in node.args.args if argument.arg != "self"]
    if not isinstance(node, ast.ClassDef):
        return []
    for child in node.body:
        if isinstance(child, ast.FunctionDef) and child.name == "__init__":
            return parameters(child)
    fields = [child.target for child in node.body if isinstance(child, ast.AnnAssign)]
    return [target.id for target in fields if isinstance(target, ast.Name)]


def reason_positions(nodes: list[ast.AST]) -> dict[str, int]:
    """Returns name → position of the parameter `reason`, for all functions and classes with one,
    and for subclasses.
    """
    positions = {
        node.name: parameters(node).index("reason")
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and "reason" in parameters(node)
    }
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    for _ in range(3):  # levels of inheritance
        for node in classes:
            for base in (base.id for base in node.bases if isinstance(base, ast.Name)):
                if base in positions:
                    positions.setdefault(node.name, positions[base])
    return positions


def used_reasons(nodes: list[ast.AST]) -> set[str]:
    """Returns all literals that are arguments for `reason`, also inside conditional expressions."""
    positions = reason_positions(nodes)
    values: list[ast.expr] = []
    for node in nodes:
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in positions:
                values += [word.value for word in node.keywords if word.arg == "reason"]
                values += node.args[positions[name] : positions[name] + 1]
    for value in list(values):
        if isinstance(value, ast.IfExp):
            values += [value.body, value.orelse]
    return literals(values) - {""}


def literals(nodes: list[ast.AST] | list[ast.expr]) -> set[str]:
    constants = (node.value for node in nodes if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str)}


def test_every_used_reason_is_documented(nodes: list[ast.AST]) -> None:
    reasons = used_reasons(nodes)
    assert {"no_face", "blurred", "near_duplicate", "truncated_tar", "not_a_file"} <= reasons
    assert not {reason for reason in reasons if explain(reason) is None}


def test_every_documented_reason_is_used(nodes: list[ast.AST]) -> None:
    texts = literals(nodes)
    assert not {reason for reason in REASONS if reason.removesuffix("*") not in texts}


def test_the_page_equals_the_one_generated_from_the_table() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert text == reasons_page(), "run `python -m tests.docs`"


def test_an_http_status_is_explained() -> None:
    assert explain("http_404") is REASONS["http_*"]
    assert explain("http_") is None and explain("nothing") is None
