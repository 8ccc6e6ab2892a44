"""The small base model that comes with the project, and its pre-trained adapter: model/small.

README.md      model card
files.json     size and sha256 of each file
base/          diffusers' layout, half precision
adapter/       adapter.safetensors, adapter.json
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Final

from configs.errors import WeightsError

FOLDER: Final = Path(__file__).parent / "small"
FILES: Final = "files.json"


def shipped_base() -> Path:
    """Returns the folder of the base. Raises what `check_files` raises."""
    check_files()
    return FOLDER / "base"


def shipped_adapter() -> Path:
    """Returns the folder of the adapter. Raises what `check_files` raises."""
    check_files()
    return FOLDER / "adapter"


@cache
def check_files(folder: Path = FOLDER) -> None:
    """Compares the files with files.json; a process does it once.

    Raises WeightsError, which names the first file that is missing or differs.
    """
    how = "Restore it with git: `git checkout -- model/small`."
    try:
        listed = json.loads((folder / FILES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder / FILES} can't be read ({error}). {how}") from error
    for name, expected in listed.items():
        path = folder / name
        if not path.is_file():
            raise WeightsError(f"{path} is missing. {how}")
        digest = _sha256(path)
        if digest != expected:
            raise WeightsError(f"{path} has sha256 {digest}, expected {expected}. {how}")


def write_file_list(folder: Path) -> None:
    """Writes files.json, with the digests of all other files but the model card."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    for name in (FILES, "README.md"):
        names.pop(name, None)
    digests = {name: _sha256(path) for name, path in names.items()}
    (folder / FILES).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
