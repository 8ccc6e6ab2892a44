"""Checkpoints of transformers: where one is, and what identifies it, without loading it."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from configs.errors import ConfigError, WeightsError

# endings of the files of a checkpoint that captions depend on
_HASHED_FILES = (".safetensors", ".json", ".txt", ".model", ".jinja")


def digest(model: str) -> str:
    """Returns the commit of a checkpoint on the hub, or a sha256 over the files of a local one.

    Raises the errors of `locate`.
    """
    name, revision = locate(model)
    return revision or _folder_digest(Path(name))


def locate(model: str) -> tuple[str, str]:
    """Returns (folder, "") for a local checkpoint, (hub id, commit) for one on the hub.

    The commit is that of a snapshot in the local cache, else that which the hub states, so that the
    loaded checkpoint is the one in the stage's signature. Raises ConfigError if `model` is empty,
    WeightsError if there is no such checkpoint.
    """
    if not model:
        raise ConfigError(
            "caption.llava.model is empty, and caption.backend=llava needs one: a folder or a hub "
            "id, such as llava-hf/llava-1.5-7b-hf. caption.backend=attributes needs none."
        )
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            raise WeightsError(
                f"caption.llava.model={model!r}: the folder has no config.json or no "
                "*.safetensors file."
            )
        return str(folder), ""
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise WeightsError(
            f"caption.llava.model={model!r}: there is no such folder, and a hub id looks like "
            "OWNER/NAME."
        )
    return _hub_commit(*model.partition("@")[::2])


@lru_cache(maxsize=8)
def _hub_commit(name: str, revision: str) -> tuple[str, str]:
    from huggingface_hub import HfApi, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=revision or None)
    if isinstance(cached, str):
        return name, Path(cached).parent.name  # …/snapshots/COMMIT/config.json
    try:
        commit = HfApi().model_info(name, revision=revision or None, timeout=30).sha
    except Exception as error:
        raise WeightsError(
            f"caption.llava.model={name!r} is not a local folder, is not in the hub's local "
            f"cache, and the hub could not be reached: {type(error).__name__}: {error} Give a "
            f"folder with the checkpoint, or download it with `hf download {name}` first."
        ) from error
    return name, str(commit)


def _folder_digest(folder: Path) -> str:
    """Returns a sha256 over the relative names and the digests of the files that captions depend
    on.
    """
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in _HASHED_FILES and path.is_file():
            stat = path.stat()
            digest = _file_digest(path, stat.st_size, stat.st_mtime_ns)
            total.update(f"{digest}  {path.relative_to(folder).as_posix()}\n".encode())
    return total.hexdigest()


@lru_cache(maxsize=256)
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    """Returns a file's sha256, cached while its size and time are the same, since checkpoints have
    gigabytes.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
