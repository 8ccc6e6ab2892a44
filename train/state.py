"""Checkpoints of a run: OUT/checkpoint-000100/, written under another name and renamed when whole.

    adapter.safetensors, adapter.json   the adapter, as inference reads it
    dataset.yaml                        the data set's configuration: inference runs the very same stages
    unet/                               the UNet, if it was trained too
    state.pt                            optimizer, schedule, random states, step and position; tensors and plain values

The last adapter also stands in OUT/final, without state.pt.
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
_NAME: Final = re.compile(r"checkpoint-(\d{6,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Artefact:
    """What goes beside an adapter. described: JSON-ready, into adapter.json. dataset: YAML, "" for
    none.
    """

    described: dict[str, Any]
    dataset: str
    with_unet: bool


def checkpoint_name(step: int) -> str:
    return f"checkpoint-{step:06d}"


def checkpoints(output: Path) -> list[Path]:
    """The whole checkpoints under `output`, oldest first."""
    found = [
        (int(match[1]), path)
        for path in output.glob("checkpoint-*")
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found) if (path / STATE_FILE).is_file()]


def find_checkpoint(output: Path, wanted: str) -> Path | None:
    """The checkpoint to go on from, None to begin. wanted: latest, a name or a folder, or "" to
    refuse old output.

    Raises ConfigError if `wanted` isn't there, or if nothing is wanted and the output has
    checkpoints.
    """
    present = checkpoints(output)
    if wanted == "latest":
        return present[-1] if present else None
    if not wanted:
        if present:
            raise ConfigError(
                f"{output} has checkpoints up to {present[-1].name} and resume_from_checkpoint "
                "is empty. Name another "
                "output, or say resume_from_checkpoint=latest."
            )
        return None
    for path in (output / wanted, Path(wanted)):
        if (path / STATE_FILE).is_file():
            return path
    raise ConfigError(
        f"resume_from_checkpoint={wanted}: no checkpoint there. In {output}: "
        f"{', '.join(path.name for path in present) or 'none'}."
    )


def write_adapter(folder: Path, trained: TrainedModel, artefact: Artefact) -> Path:
    """The adapter and all that inference needs with it, into `folder`."""
    save_adapter(trained.adapter, folder, artefact.described)
    if artefact.with_unet:
        save_unet(trained.unet, folder / "unet")
    if artefact.dataset:
        (folder / DATASET_FILE).write_text(artefact.dataset, encoding="utf-8")
    return folder


def write_whole(target: Path, fill: Callable[[Path], object]) -> Path:
    """A folder that is there whole or not at all; one of that name is replaced."""
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
    artefact: Artefact,
    state: dict[str, Any],
    *,
    limit: int,
) -> Path:
    """Write checkpoint `step`, then remove the oldest beyond `limit` (0: none). state: tensors and
    plain values.
    """

    def fill(folder: Path) -> None:
        write_adapter(folder, trained, artefact)
        torch.save(state, folder / STATE_FILE)

    target = write_whole(output / checkpoint_name(step), fill)
    if limit:
        for old in checkpoints(output)[:-limit]:
            shutil.rmtree(old)
    return target


def sweep(output: Path) -> None:
    """Remove what a killed run left half written."""
    for trace in (*output.glob(".*.partial"), *output.glob(".*.old")):
        shutil.rmtree(trace, ignore_errors=True)


def load_checkpoint(folder: Path, trained: TrainedModel, *, with_unet: bool) -> dict[str, Any]:
    """Load a checkpoint's weights into the model; returns its state. Raises WeightsError if it
    doesn't fit.
    """
    try:
        state: dict[str, Any] = torch.load(
            folder / STATE_FILE, map_location="cpu", weights_only=True
        )
    except Exception as error:  # torch raises several kinds, among them a bare UnpicklingError
        raise WeightsError(
            f"{folder / STATE_FILE} can't be read ({error}); go on from an older one with "
            "resume_from_checkpoint=NAME"
        ) from error
    load_adapter(folder, trained.adapter)
    if with_unet:
        load_unet(folder / "unet", trained.unet)
    return state


def load_unet(folder: Path, unet: Any) -> None:
    """Load weights written by `save_unet`; the adapter's processors in the UNet stay as they are."""
    from safetensors.torch import load_file

    path = folder / "diffusion_pytorch_model.safetensors"
    if not path.is_file():
        raise WeightsError(
            f"{folder}: no UNet there, though train_base=true; resume from a checkpoint that has one"
        )
    wrong = unet.load_state_dict(load_file(path), strict=False)
    missing = [key for key in wrong.missing_keys if ".processor." not in key]
    if missing or wrong.unexpected_keys:
        raise WeightsError(
            f"{path} is of another UNet: {[*missing, *wrong.unexpected_keys][:4]}; check model.base"
        )


def random_state() -> dict[str, Any]:
    """This process's random states, as tensors."""
    cuda = (
        torch.cuda.get_rng_state()
        if torch.cuda.is_available()
        else torch.empty(0, dtype=torch.uint8)
    )
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(states: list[dict[str, Any]], rank: int) -> None:
    """Go on with process `rank`'s random states; a process that wasn't there before keeps its own."""
    if rank >= len(states):
        return
    torch.set_rng_state(states[rank]["cpu"])
    if torch.cuda.is_available() and len(states[rank]["cuda"]):
        torch.cuda.set_rng_state(states[rank]["cuda"])


def write_json(path: Path, value: Any) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)
