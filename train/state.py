"""The state of a run: copied for a checkpoint, written, and restored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from configs.errors import TrainingError, WeightsError
from model.checkpoint import load_adapter, save_adapter
from train.checkpoints import write_file_list
from train.sharding import whole
from train.step import TrainedModel

STATE_FILE: Final = "state.pt"
DATASET_FILE: Final = "dataset.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterExtras:
    """What is written with an adapter.

    metadata: entries for adapter.json. dataset: the data set's configuration as YAML, "" for none.
    """

    metadata: dict[str, Any]
    dataset: str


class Snapshot:
    """A copy of weights and state in the CPU's memory, which later steps don't change.

    trained: the model, on which no step is being taken. state: for state.pt, tensors and plain
    values, with the `step`. weights: some of the adapter's, by name, that are copied in place of
    those that it has now. Copies from a GPU go to pinned memory, and are waited for once. Sharded
    tensors are gathered: the other processes must call `take_part` for the same ones.
    """

    def __init__(
        self,
        trained: TrainedModel,
        extras: AdapterExtras,
        state: Mapping[str, Any],
        weights: Mapping[str, Tensor],
    ) -> None:
        self._trained, self._extras = trained, extras  # of the first, only the configuration
        self._adapter: dict[str, Tensor] = _copy({**trained.adapter.state_dict(), **weights})
        self.state: dict[str, Any] = _copy(state)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def write(self, folder: Path) -> None:
        """Writes the files of a checkpoint."""
        self.write_adapter(folder)
        with (folder / STATE_FILE).open("wb") as file:  # torch's own file hides the system's error
            torch.save(self.state, file)
        write_file_list(folder)

    def write_adapter(self, folder: Path) -> None:
        """Writes the adapter, and what inference needs with it."""
        extras = self._extras
        save_adapter(self._trained.adapter, folder, extras.metadata, self._adapter)
        if extras.dataset:
            (folder / DATASET_FILE).write_text(extras.dataset, encoding="utf-8")

    def check_finite(self) -> None:
        """Raises TrainingError if a weight is not finite."""
        for name, value in self._adapter.items():
            if not bool(torch.isfinite(value).all()):
                raise TrainingError(
                    f"{name} has values that are not finite after step {self.step:,}, so no "
                    "checkpoint is written. The one before is intact. Lower optim.learning_rate, "
                    "or set mixed_precision to bf16 or no."
                )


def _copy(value: Any) -> Any:
    """Copies tensors in nested dicts, lists and tuples to the CPU; those on a GPU without waiting
    for it.
    """
    if isinstance(value, Tensor):
        value = whole(value.detach())
        if value.device.type != "cuda":
            return value.to("cpu", copy=True)
        pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return pinned.copy_(value, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(item) for item in value)
    return value


def load_checkpoint(folder: Path, trained: TrainedModel) -> dict[str, Any]:
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
    return state


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
