"""Checkpoints of a run: OUT/checkpoint-000100/, written under another name, then renamed.

    adapter.safetensors, adapter.json   the adapter, as inference reads it
    dataset.yaml                        the data set's configuration: inference runs its stages
    unet/                               the UNet, if it was trained too
    state.pt                            optimizer, schedule, random states, step, position: tensors
                                        and plain values only
    files.json                          size and sha256 of each of these files, written last

The last adapter is also in OUT/final, without state.pt.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from configs.errors import ConfigError, TrainingError, WeightsError
from model.checkpoint import load_adapter, save_adapter, save_unet
from train.step import TrainedModel

STATE_FILE: Final = "state.pt"
DATASET_FILE: Final = "dataset.yaml"
FILES: Final = "files.json"
_CHECKPOINT_NAME: Final = re.compile(r"checkpoint-(\d{6,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterExtras:
    """What is written with an adapter.

    metadata: entries for adapter.json. dataset: the data set's configuration as YAML, "" for none.
    with_unet: whether to write the UNet.
    """

    metadata: dict[str, Any]
    dataset: str
    with_unet: bool


def checkpoint_name(step: int) -> str:
    return f"checkpoint-{step:06d}"


def checkpoints(output: Path) -> list[Path]:
    """Returns the complete checkpoints under `output`, oldest first."""
    by_step = [
        (int(match[1]), path)
        for path in output.glob("checkpoint-*")
        if (match := _CHECKPOINT_NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(by_step) if (path / STATE_FILE).is_file()]


def find_checkpoint(
    output: Path, requested: str, message: Callable[[str], None] = lambda text: None
) -> Path | None:
    """Returns the checkpoint to resume from, or None for a new run.

    requested: "latest", which is the newest intact one; a checkpoint's name or folder; or "" for a
    new run only. message: called with a line for each damaged one. Raises ConfigError if the
    requested one doesn't exist, or if "" is requested and the output has checkpoints; WeightsError
    if the requested one, or each one, is damaged.
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
        if (path / STATE_FILE).is_file():
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


def write_adapter(folder: Path, trained: TrainedModel, extras: AdapterExtras) -> Path:
    """Writes the adapter, and what inference needs with it, into `folder`; returns the folder."""
    save_adapter(trained.adapter, folder, extras.metadata)
    if extras.with_unet:
        save_unet(trained.unet, folder / "unet")
    if extras.dataset:
        (folder / DATASET_FILE).write_text(extras.dataset, encoding="utf-8")
    return folder


def write_folder_atomically(target: Path, fill: Callable[[Path], object]) -> Path:
    """Lets `fill` fill a temporary folder, then renames it to `target`; returns `target`.

    An existing `target` is replaced.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    for path in (*partial.rglob("*"), partial):
        _sync(path)
    if target.exists():
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old)
    else:
        partial.rename(target)
    _sync(target.parent)
    return target


def _sync(path: Path) -> None:
    """Writes a file or a folder's entries to the disk, so that they outlast a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(
    output: Path,
    step: int,
    trained: TrainedModel,
    extras: AdapterExtras,
    state: dict[str, Any],
    *,
    limit: int,
) -> Path:
    """Writes the checkpoint of `step`, removes the oldest ones, and returns its folder.

    state: for state.pt, tensors and plain values. limit: number of checkpoints that remain; 0
    removes none.
    """

    def fill(folder: Path) -> None:
        write_adapter(folder, trained, extras)
        torch.save(state, folder / STATE_FILE)
        _write_file_list(folder)

    _check_finite(trained, state["step"])
    target = write_folder_atomically(output / checkpoint_name(step), fill)
    if limit:
        for old in checkpoints(output)[:-limit]:
            shutil.rmtree(old)
    return target


def _check_finite(trained: TrainedModel, step: int) -> None:
    """Raises TrainingError if a trained weight is not finite."""
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise TrainingError(
                f"{name} has values that are not finite after step {step:,}, so no checkpoint is "
                "written. The one before is intact. Lower optim.learning_rate, or set "
                "mixed_precision to bf16 or no."
            )


def _write_file_list(folder: Path) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / FILES).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def damage(folder: Path) -> str:
    """Returns which file of a checkpoint is damaged, and how; "" if none is. Checkpoints of version
    0.1 have no list of their files, so damage is noticed when they are loaded.
    """
    path = folder / FILES
    if not path.is_file():
        return ""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{FILES} can't be read"
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size or _sha256(file) != digest:
            return f"{name} is not as it was written"
    return ""


def remove_partial_folders(output: Path) -> None:
    """Removes the temporary folders of `write_folder_atomically` that a killed run left behind."""
    for folder in (*output.glob(".*.partial"), *output.glob(".*.old")):
        shutil.rmtree(folder, ignore_errors=True)


def load_checkpoint(folder: Path, trained: TrainedModel, *, with_unet: bool) -> dict[str, Any]:
    """Loads a checkpoint's weights into the model, and returns the contents of its state.pt.

    Raises WeightsError if a file can't be read or doesn't fit the model.
    """
    try:
        state: dict[str, Any] = torch.load(
            folder / STATE_FILE, map_location="cpu", weights_only=True
        )
    except Exception as error:  # torch raises several kinds, among them a bare UnpicklingError
        raise WeightsError(
            f"{folder / STATE_FILE} can't be read ({error}); resume from an older checkpoint with "
            "resume_from_checkpoint=NAME"
        ) from error
    load_adapter(folder, trained.adapter)
    if with_unet:
        load_unet(folder / "unet", trained.unet)
    return state


def load_unet(folder: Path, unet: Any) -> None:
    """Loads weights that `model.checkpoint.save_unet` wrote.

    The adapter's processors in the UNet are left unchanged. Raises WeightsError if the file is
    missing or belongs to another UNet.
    """
    from safetensors.torch import load_file

    path = folder / "diffusion_pytorch_model.safetensors"
    if not path.is_file():
        raise WeightsError(
            f"{folder}: no UNet there, but train_base=true; resume from a checkpoint with one"
        )
    mismatch = unet.load_state_dict(load_file(path), strict=False)
    missing = [key for key in mismatch.missing_keys if ".processor." not in key]
    if missing or mismatch.unexpected_keys:
        raise WeightsError(
            f"{path} belongs to another UNet, whose keys differ: "
            f"{[*missing, *mismatch.unexpected_keys][:4]}; check model.base"
        )


def random_state() -> dict[str, Any]:
    """Returns this process's random states as tensors; without a GPU "cuda" is empty."""
    cuda = (
        torch.cuda.get_rng_state()
        if torch.cuda.is_available()
        else torch.empty(0, dtype=torch.uint8)
    )
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(states: list[dict[str, Any]], rank: int) -> None:
    """Restores the random states of process `rank`.

    states: `random_state()` of every process of the earlier run. A process whose rank it didn't
    have is left unchanged.
    """
    if rank >= len(states):
        return
    torch.set_rng_state(states[rank]["cpu"])
    if torch.cuda.is_available() and len(states[rank]["cuda"]):
        torch.cuda.set_rng_state(states[rank]["cuda"])


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file under another name, then renames it to `path`."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)
