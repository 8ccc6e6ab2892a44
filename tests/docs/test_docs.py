"""The documentation names only files, headings, make targets, commands and keys that exist."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from configs.portraits import InferConfig
from configs.schema import DatasetConfig
from configs.training import TrainConfig
from pipelines.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
README_LINES = 120
IMAGE_BYTES = 400_000

LINK = re.compile(r"\]\(([^)\s]*)\)")
CODE = re.compile(r"^ *```(?s:.*?)^ *```|^ {4}.*$|`[^`\n]+`", re.MULTILINE)
KEY = re.compile(r"(?<![\w./-])[a-z_]+(?:\.[a-z0-9_]+)+")

page = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def code(path: Path) -> str:
    """Returns the inline code and code blocks of a page."""
    return "\n".join(CODE.findall(path.read_text(encoding="utf-8")))


def anchors(path: Path) -> set[str]:
    """Returns GitHub's anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.strip().replace(" ", "-") for title in plain}


def sections() -> dict[str, list[type[Any]]]:
    """Returns section name → its classes in the data set, training and inference configurations."""
    classes: dict[str, list[type[Any]]] = {}
    for config in (DatasetConfig, TrainConfig, InferConfig):
        for name, kind in typing.get_type_hints(config).items():
            if is_dataclass(kind):
                classes.setdefault(name, []).append(typing.cast(type[Any], kind))
    return classes


def has_key(kind: type[Any], names: list[str]) -> bool:
    """Returns whether a configuration class has the key `names`, joined by dots."""
    hints = typing.get_type_hints(kind)
    if names[0] not in {field.name for field in fields(kind)}:
        return False
    inner = hints[names[0]]
    return len(names) == 1 or (is_dataclass(inner) and has_key(inner, names[1:]))


FILES = (["json"], ["jsonl"])  # endings of files, which are no settings


def unknown_keys(text: str) -> Iterator[str]:
    """Yields the keys in a text that name a section, no setting of it, and no module."""
    classes = sections()
    for key in KEY.findall(text):
        section, *names = key.split(".")
        module = Path(ROOT, *key.split("."))
        if module.is_dir() or module.with_suffix(".py").is_file() or names[-1:] in FILES:
            continue
        if section in classes and not any(has_key(kind, names) for kind in classes[section]):
            yield key


@page
def test_every_relative_link_leads_to_an_existing_file_and_heading(path: Path) -> None:
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), f"{target} is missing"
        assert not anchor or anchor in anchors(linked), f"{target}: no such heading"


@page
def test_every_make_target_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?<![\w-])make ([a-z][a-z-]+)", code(path))) <= targets


@page
def test_every_command_and_preset_exists(path: Path) -> None:
    text = code(path)
    commands = {
        info.name or str(info.callback and info.callback.__name__)
        for info in app.registered_commands
    }
    assert set(re.findall(r"pipelines\.cli ([a-z-]+)", text)) <= commands
    for module in re.findall(r"python -m ((?:pipelines|train|infer|bench|tests)\.?[a-z_.]*)", text):
        file = ROOT / module.replace(".", "/")
        assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), module
    assert all((ROOT / name).exists() for name in re.findall(r"configs/\w+/\w+\.yaml", text))


@page
def test_every_configuration_key_exists(path: Path) -> None:
    assert not list(unknown_keys(code(path)))


def test_unknown_keys_are_found() -> None:
    text = "`rules.min_sharpnes=1` `source.kind` `stages/backends/weights.py` `model.spec` `ray.x`"
    assert list(unknown_keys(text)) == ["rules.min_sharpnes", "ray.x"]


def test_the_readme_is_short_and_its_images_are_small() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES
    sizes = [file.stat().st_size for file in (ROOT / "docs" / "images").iterdir()]
    assert sum(sizes) < IMAGE_BYTES
