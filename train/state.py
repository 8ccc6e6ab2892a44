"""Checkpoints of a run: OUT/checkpoint-000100/, written under another name, then renamed.

    adapter.safetensors, adapter.json   the adapter, as inference reads it
    dataset.yaml                        the data set's configuration: inference runs its stages
    unet/                               the UNet, if it was trained too
    state.pt                            optimizer, schedule, random states, step, position: tensors
                                        and plain values only

The last adapter is also in OUT/final, without state.pt.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from configs.errors import ConfigError, WeightsError
from model.checkpoint import load_adapter, save_adapter, save_unet
from train.step import TrainedModel

STATE_FILE: Final = "state.pt"
DATASET_FILE: Final = "dataset.yaml"
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


def find_checkpoint(output: Path, requested: str) -> Path | None:
    """Returns the checkpoint to resume from, or None for a new run.

    requested: "latest", a checkpoint's name or folder, or "" for a new run only. Raises ConfigError
    if the requested one doesn't exist, or if "" is requested and the output has checkpoints.
    """
    existing = checkpoints(output)
    if requested == "latest":
        return existing[-1] if existing else None
    if not requested:
        if existing:
            raise ConfigError(
                f"{output} has checkpoints up to {existing[-1].name}, but resume_from_checkpoint "
                "is empty. Name another output, or set resume_from_checkpoint=latest."
            )
        return None
    for path in (output / requested, Path(requested)):
        if (path / STATE_FILE).is_file():
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
    if target.exists():
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old)
    else:
        partial.rename(target)
    return target


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

    target = write_folder_atomically(output / checkpoint_name(step), fill)
    if limit:
        for old in checkpoints(output)[:-limit]:
            shutil.rmtree(old)
    return target


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
