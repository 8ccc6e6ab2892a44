"""docs/reasons.md is up to date, and its table holds exactly the reasons that the code gives."""

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
    """Every node of the shipped code, but for the table itself."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in paths if path != TABLE)
    return [node for tree in trees for node in ast.walk(tree)]


def parameters(node: ast.AST) -> list[str]:
    """Names of what a function or class is called with."""
    if isinstance(node, ast.FunctionDef):
        return [argument.arg for argument in node.args.args if argument.arg != "self"]
    if not isinstance(node, ast.ClassDef):
        return []
    for child in node.body:
        if isinstance(child, ast.FunctionDef) and child.name == "__init__":
            return parameters(child)
    fields = [child.target for child in node.body if isinstance(child, ast.AnnAssign)]
    return [target.id for target in fields if isinstance(target, ast.Name)]


def positions(nodes: list[ast.AST]) -> dict[str, int]:
    """Function or class that takes a `reason` → the parameter's position; subclasses too."""
    found = {
        node.name: parameters(node).index("reason")
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and "reason" in parameters(node)
    }
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    for _ in range(3):  # levels of inheritance
        for node in classes:
            for base in (base.id for base in node.bases if isinstance(base, ast.Name)):
                if base in found:
                    found.setdefault(node.name, found[base])
    return found


def given_reasons(nodes: list[ast.AST]) -> set[str]:
    """Every literal that is given as a `reason`, on either side of a conditional expression too."""
    takers = positions(nodes)
    values: list[ast.expr] = []
    for node in nodes:
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in takers:
                values += [word.value for word in node.keywords if word.arg == "reason"]
                values += node.args[takers[name] : takers[name] + 1]
    for value in list(values):
        if isinstance(value, ast.IfExp):
            values += [value.body, value.orelse]
    return literals(values) - {""}


def literals(nodes: list[ast.AST] | list[ast.expr]) -> set[str]:
    constants = (node.value for node in nodes if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str)}


def test_every_reason_that_is_given_is_documented(nodes: list[ast.AST]) -> None:
    found = given_reasons(nodes)
    assert {"no_face", "blurred", "near_duplicate", "truncated_tar", "not_a_file"} <= found
    assert not {reason for reason in found if explain(reason) is None}


def test_every_documented_reason_is_given(nodes: list[ast.AST]) -> None:
    known = literals(nodes)
    assert not {reason for reason in REASONS if reason.removesuffix("*") not in known}


def test_the_page_is_generated_from_the_table() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert text == reasons_page(), "run `python -m tests.docs`"


def test_an_http_status_is_explained() -> None:
    assert explain("http_404") is REASONS["http_*"]
    assert explain("http_") is None and explain("nothing") is None
