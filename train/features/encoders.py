"""The encoders that features are computed with: their folders, settings and digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from configs.errors import WeightsError

_CONFIG: Final = "config.json"
# names of an encoder's weights, in the order in which the libraries look for them
_WEIGHTS: Final = (
    *("diffusion_pytorch_model*.safetensors", "model*.safetensors"),
    *("diffusion_pytorch_model*.bin", "pytorch_model*.bin"),
)
_EXPECTED: Final = "Name a folder in diffusers' layout, or a hub id (which needs a network)."


def encoder_folder(root: str, folder: str) -> Path:
    """Returns the local folder of an encoder: that of a hub id is downloaded. Raises WeightsError
    if it can't be.
    """
    for weights in (_WEIGHTS[:2], _WEIGHTS[2:]):
        path = _local(root, folder, (_CONFIG, *weights))
        if any(_weights_in(path)):
            return path
    raise WeightsError(
        f"{root}/{folder} has no weights in safetensors or PyTorch's form. {_EXPECTED}"
    )


def read_config(root: str, folder: str) -> dict[str, Any]:
    """Returns an encoder's config.json. Raises WeightsError if it can't be read."""
    path = encoder_folder(root, folder) / _CONFIG
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path} can't be read ({error}). Name a base in diffusers' layout."
        ) from error
    return values


def encoder_digest(root: str, folder: str) -> str:
    """Returns a digest of an encoder's weights and configuration."""
    path = encoder_folder(root, folder)
    return _digest((path / _CONFIG, *_weights_in(path)))


def tokenizer_digest(root: str, folder: str) -> str:
    """Returns a digest of a tokenizer: of all files in its folder. Raises WeightsError if there are
    none.
    """
    path = _local(root, folder, ("*",))
    files = [file for file in sorted(path.glob("[!.]*")) if file.is_file()]
    if not files:
        raise WeightsError(f"{root}/{folder} has no tokenizer. {_EXPECTED}")
    return _digest(files)


def _local(root: str, folder: str, names: Sequence[str]) -> Path:
    """Returns a local folder; of a hub id, these files of it are downloaded."""
    if Path(root).is_dir():
        return Path(root, folder)
    from huggingface_hub import snapshot_download

    inside = f"{folder}/" if folder else ""
    try:
        place = snapshot_download(root, allow_patterns=[f"{inside}{name}" for name in names])
    except (OSError, ValueError) as error:
        raise WeightsError(f"{root}/{folder} can't be downloaded ({error}). {_EXPECTED}") from error
    return Path(place, folder)


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            line = f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n"
        digest.update(line.encode())
    return digest.hexdigest()


def _weights_in(path: Path) -> list[Path]:
    """Returns the files of weights that are loaded, without variants such as fp16."""
    for pattern in _WEIGHTS:
        files = [file for file in sorted(path.glob(pattern)) if ".fp16" not in file.name]
        if files:
            return files
    return []
