"""The folders of checkpoints: OUT/checkpoint-000100/, written under another name, then renamed.

    adapter.safetensors, adapter.json   the adapter, as inference reads it
    dataset.yaml                        the data set's configuration: inference runs its stages
    state.pt                            optimizer, schedule, random states, step, position: tensors
                                        and plain values only
    files.json                          format, size and sha256 of each of these files, and its own
                                        sha256. It is written last: a folder without it is not a
                                        checkpoint

The last adapter is also in OUT/final, without state.pt and files.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Final

from safetensors import SafetensorError

from configs.errors import ConfigError, StoreError, WeightsError

FILES: Final = "files.json"
# of checkpoints; rises when the meaning of a file in them changes, or the order of samples
FORMAT: Final = 2
_NAME: Final = re.compile(r"checkpoint-(\d{6,})")
_PARTIAL: Final = ".partial"  # end of the name of a folder that is being written or removed
_OLD: Final = ".old"  # of one that is being replaced
REPLACED: Final = "replaced-"  # begin of the name of a checkpoint that isn't of the run any more


def checkpoint_name(step: int) -> str:
    return f"checkpoint-{step:06d}"


def step_of(name: str) -> int | None:
    """Returns the step of a checkpoint's name; None if it isn't one."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def checkpoints(output: Path) -> list[Path]:
    """Returns the checkpoints under `output`, oldest first."""
    by_step = [
        (step, path)
        for path in output.glob("checkpoint-*")
        if (step := step_of(path.name)) is not None and (path / FILES).is_file()
    ]
    return [path for _, path in sorted(by_step)]


def find_checkpoint(
    output: Path, requested: str, message: Callable[[str], None] = lambda text: None
) -> Path | None:
    """Returns the checkpoint to resume from, or None for a new run.

    requested: "latest", which is the newest intact one; a checkpoint's name or folder; or "" for a
    new run only. message: called with a line for each damaged one. Raises ConfigError if the
    requested one doesn't exist, or if "" is requested and the output has checkpoints; WeightsError
    if the requested one, or each one, is damaged, or if it has a format that isn't read.
    """
    existing = checkpoints(output)
    if requested == "latest":
        for path in reversed(existing):
            if not (how := damage(path)):
                return path
            message(f"{path} is damaged ({how}), so the one before is used")
        if existing:
            raise WeightsError(
                f"all {len(existing)} checkpoints in {output} are damaged. Restore one from a "
                "copy, or give another output."
            )
        return None
    if not requested:
        if existing:
            raise ConfigError(
                f"{output} has checkpoints up to {existing[-1].name}, but resume_from_checkpoint "
                "is empty. Name another output, or set resume_from_checkpoint=latest."
            )
        return None
    for path in (output / requested, Path(requested)):
        if (path / FILES).is_file():
            if how := damage(path):
                raise WeightsError(
                    f"{path} is damaged: {how}. Resume from another one of those in {output}: "
                    f"{', '.join(each.name for each in existing) or 'none'}."
                )
            return path
    raise ConfigError(
        f"resume_from_checkpoint={requested}: no checkpoint there. Name one of those in {output}: "
        f"{', '.join(path.name for path in existing) or 'none'}."
    )


def expired(steps: Iterable[int], newest: int, limit: int) -> list[int]:
    """Returns the steps of the checkpoints to remove once that of step `newest` is complete: those
    of later steps, which this run passed over when it was resumed, and all but the last `limit` of
    the others (0: none of them).
    """
    later = [step for step in steps if step > newest]
    earlier = sorted(step for step in steps if step <= newest)
    return [*(earlier[:-limit] if limit else ()), *sorted(later)]


def later_than(output: Path, step: int) -> list[Path]:
    """Returns the checkpoints of later steps."""
    return [path for path in checkpoints(output) if (step_of(path.name) or 0) > step]


def set_aside(output: Path, step: int) -> None:
    """Renames the checkpoints of later steps than that from which a run resumes, since the files of
    lines lose these steps: a run that is killed before its next checkpoint must not resume from
    them. `remove_replaced` removes them.
    """
    for path in later_than(output, step):
        target = output / f"{REPLACED}{path.name}"
        shutil.rmtree(target, ignore_errors=True)
        path.rename(target)


def remove_replaced(output: Path) -> list[str]:
    """Removes what `set_aside` has renamed, and returns the names."""
    paths = sorted(output.glob(f"{REPLACED}checkpoint-*"))
    for path in paths:
        shutil.rmtree(path)
    return [path.name for path in paths]


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint; if the process is killed meanwhile, no part of it counts."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}{_PARTIAL}")
    folder.rename(partial)
    shutil.rmtree(partial)


def write_folder_atomically(target: Path, fill: Callable[[Path], object]) -> Path:
    """Lets `fill` fill a temporary folder, then renames it to `target`; returns `target`.

    An existing `target` is replaced. Raises StoreError if the files can't be written; then nothing
    is left of them.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}{_PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        for path in (*partial.rglob("*"), partial):
            sync(path)
        if target.exists():
            old = target.with_name(f".{target.name}.{os.getpid()}{_OLD}")
            target.rename(old)
            partial.rename(target)
            shutil.rmtree(old)
        else:
            partial.rename(target)
        sync(target.parent)
    # of a full disk, safetensors raises its own error, and torch a RuntimeError
    except (OSError, SafetensorError, RuntimeError) as error:
        raise StoreError(
            f"{target} can't be written: {error}. Free disk space, or correct the folder or its "
            "permissions; then run the same command again. The checkpoints before are intact."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def remove_partial_folders(output: Path) -> None:
    """Removes the temporary folders that a killed run left behind. One whose replacement didn't
    come into its place is moved back.
    """
    for folder in output.glob(f".*{_OLD}"):
        target = folder.with_name(folder.name[1:].rsplit(".", 2)[0])
        if not target.exists():
            folder.rename(target)
    for folder in (*output.glob(f".*{_PARTIAL}"), *output.glob(f".*{_OLD}")):
        shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Writes a file or a folder's entries to the disk, so that they outlast a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file_list(folder: Path) -> None:
    """Writes files.json, with what is in the folder."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = {"format": FORMAT, "files": files}
    text = json.dumps({**content, "sha256": own_digest(content)}, indent=1)
    (folder / FILES).write_text(text + "\n", encoding="utf-8")


def file_list(text: str | bytes, name: str) -> dict[str, tuple[int, str]] | None:
    """Returns file → (bytes, sha256) of the contents of files.json; None if they can't be read, or
    if a name leads out of the checkpoint's folder.

    name: of the checkpoint. Raises WeightsError if it has another format than this version reads.
    """
    try:
        content: dict[str, Any] = json.loads(text)
        if content.pop("sha256") != own_digest(content):
            return None
        number = content["format"]
    except (ValueError, AttributeError, KeyError, TypeError):
        return None
    if number != FORMAT:
        raise WeightsError(
            f"{name} has format {number}, but this version reads and writes format {FORMAT}. "
            "Continue it with the version that wrote it, or give another output."
        )
    with suppress(TypeError, KeyError, AttributeError, ValueError):
        files = {
            str(file): (int(entry["bytes"]), str(entry["sha256"]))
            for file, entry in content["files"].items()
        }
        paths = [PurePosixPath(file) for file in files]
        if not any(path.is_absolute() or ".." in path.parts for path in paths):
            return files
    return None


def damage(folder: Path) -> str:
    """Returns which file of a checkpoint is damaged, and how; "" if none is. Raises WeightsError if
    it has another format than this version reads.
    """
    try:
        expected = file_list((folder / FILES).read_bytes(), str(folder))
    except FileNotFoundError:
        return f"{FILES} is missing"
    if expected is None:
        return f"{FILES} can't be read"
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size or _sha256(file) != digest:
            return f"{name} is not as it was written"
    return ""


def own_digest(content: Any) -> str:
    """Returns the digest that files.json has of its other entries."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
