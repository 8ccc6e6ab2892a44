"""Passed over: what a source sees but doesn't list as inputs, counted by kind and ending."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from itertools import groupby
from typing import Any, Final

_MAX_ENDINGS: Final = 100  # counted one by one; so memory is bounded
_MAX_ENDING: Final = 16  # characters
_MAX_LENGTH: Final = 300  # characters of an example
_SHOWN: Final = 8  # endings in a line
_OTHER: Final = "*"  # stands for endings beyond _MAX_ENDINGS, and for long ones
_ORDINARY: Final = re.compile(r"\.[a-z][a-z0-9]{0,9}")  # endings that can be added to a setting


class Kind(StrEnum):
    IMAGE = "image"  # in a format that is read
    UNSUPPORTED_IMAGE = "unsupported_image"
    LINKED_FOLDER = "linked_folder"
    UNLISTED_FOLDER = "unlisted_folder"
    EMPTY_NAME = "empty_name"  # of an object store, with // in it


# what is passed over, one and many, and what to do
_TEXTS: Final = {
    Kind.IMAGE: (
        "file with the contents or name of an image, whose ending isn't listed",
        "files with the contents or names of images, whose endings aren't listed",
        "",  # see _how_to_add
    ),
    Kind.UNSUPPORTED_IMAGE: (
        "image of a format that can't be read",
        "images of formats that can't be read",
        "Convert those that you want to JPEG or PNG.",
    ),
    Kind.LINKED_FOLDER: (
        "link to a folder",
        "links to folders",
        "Put the folders themselves into the source, or make a data set of each.",
    ),
    Kind.UNLISTED_FOLDER: (
        "folder that can't be listed",
        "folders that can't be listed",
        "Check permissions and the disk, then run the same command again.",
    ),
    Kind.EMPTY_NAME: (
        "folder of objects with // in their names, which can't be listed",
        "folders of objects with // in their names, which can't be listed",
        "Rename these objects.",
    ),
}


@dataclass(slots=True)
class Group:
    """Files or folders of one kind and ending. ending: lower case with a dot; "" for folders and
    names without one, "*" for rare endings together. example: the name that sorts first.
    """

    kind: Kind
    ending: str
    count: int = 0
    example: str = ""


@dataclass(slots=True)
class PassedOver:
    """What one listing passed over."""

    _groups: dict[tuple[Kind, str], Group] = field(default_factory=dict)

    def add(self, kind: Kind, name: str, ending: str = "") -> None:
        """Counts a file or folder. name: relative to the source."""
        is_new = (kind, ending) not in self._groups
        if len(ending) > _MAX_ENDING or (is_new and len(self._groups) >= _MAX_ENDINGS):
            ending = _OTHER
        group = self._groups.setdefault((kind, ending), Group(kind, ending))
        group.count += 1
        name = name[:_MAX_LENGTH]
        group.example = min(group.example or name, name)

    @property
    def groups(self) -> list[Group]:
        """Sorted by kind, then the most frequent ending first."""
        kinds = [*Kind]
        return sorted(
            self._groups.values(), key=lambda g: (kinds.index(g.kind), -g.count, g.ending)
        )

    def to_json(self) -> list[dict[str, Any]]:
        """Returns the groups as plain values, for dataset.json."""
        return [asdict(group) for group in self.groups]

    @classmethod
    def from_json(cls, values: object) -> PassedOver:
        """Returns what `to_json` returned, without what is no such value."""
        passed_over = cls()
        for value in values if isinstance(values, list) else ():
            try:
                group = Group(Kind(value["kind"]), str(value["ending"]), int(value["count"]))
                group.example = str(value["example"])
            except (TypeError, KeyError, ValueError, OverflowError):
                continue
            passed_over._groups[group.kind, group.ending] = group
        return passed_over

    def lines(self, extensions: Sequence[str] = ()) -> list[str]:
        """Returns a line for each kind: how many, an example, and what to do.

        extensions: the setting source.extensions, to state it with the missing endings; () to name
        the missing ones only.
        """
        return [
            _line(kind, [*groups], extensions)
            for kind, groups in groupby(self.groups, lambda group: group.kind)
        ]


def _line(kind: Kind, groups: Sequence[Group], extensions: Sequence[str]) -> str:
    count = sum(group.count for group in groups)
    one, many, action = _TEXTS[kind]
    example = f"for example {_printable(min(group.example for group in groups))}"
    if kind in (Kind.IMAGE, Kind.UNSUPPORTED_IMAGE):
        example = f"{_endings(groups)}; {example}"
    if kind is Kind.IMAGE:
        action = _how_to_add(groups, extensions)
    return f"passed over: {count:,} {one if count == 1 else many} ({example}). {action}"


def _endings(groups: Sequence[Group]) -> str:
    """Returns such as ".jfif 10, .dat 2"."""
    names = {"": "no ending", _OTHER: "other endings"}
    shown = [f"{names.get(g.ending, _printable(g.ending))} {g.count:,}" for g in groups[:_SHOWN]]
    rest = sum(group.count for group in groups[_SHOWN:])
    return ", ".join([*shown, f"others {rest:,}"] if rest else shown)


def _how_to_add(groups: Sequence[Group], extensions: Sequence[str]) -> str:
    endings = [group.ending for group in groups if _ORDINARY.fullmatch(group.ending)]
    advice = []
    if endings and extensions:
        advice.append(f"To use them: 'source.extensions=[{','.join([*extensions, *endings])}]'.")
    elif endings:
        advice.append(f"To use them, add {', '.join(endings)} to source.extensions.")
    if len(endings) < len(groups):
        advice.append("Rename those without an ordinary ending.")
    return " ".join(advice)


def _printable(name: str) -> str:
    """Returns `name` with control characters, which a terminal would obey, as escape sequences."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in name)
