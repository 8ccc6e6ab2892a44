"""A part of the base that is trained by itself, and the loop that trains it.

OUT/NAME/  checkpoint-NNNNNN/  losses.jsonl  previews/NNNNNN.png  final/
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from configs.base_model import BaseConfig, PartConfig
from configs.errors import TrainingError, WeightsError
from train.checkpoints import (
    checkpoint_name,
    checkpoints,
    expired,
    find_checkpoint,
    remove_checkpoint,
    step_of,
    write_file_list,
    write_folder_atomically,
)
from train.history import Lines, exact
from train.order import SampleOrder
from train.stopping import Stop

if TYPE_CHECKING:
    from accelerate import Accelerator

FINAL: Final = "final"
PREVIEWS: Final = "previews"
LOSSES: Final = "losses.jsonl"
_STATE: Final = "state.pt"
_LIMIT: Final = 2  # checkpoints that remain


class PartWatcher(Protocol):
    """Receives the messages and the progress of a run."""

    def message(self, text: str) -> None:
        """Called with a line for the user."""
        ...

    def start(self, name: str, step: int, total: int, batch_size: int) -> None:
        """Called before the first step of a part."""
        ...

    def step(self, step: int, losses: dict[str, float] | None) -> None:
        """Called after every step. losses: means since the last ones; None where they aren't
        fetched.
        """
        ...


class Part(ABC):
    """A part of the base model.

    name: of its folder. losses: names of the values that `update` returns. steps: at which the
    training ends, at least 1. seed: of weights and random numbers. accelerator: runs the processes.
    """

    name: ClassVar[str]
    losses: ClassVar[tuple[str, ...]]

    def __init__(self, settings: PartConfig, steps: int, seed: int, accelerator: Accelerator):
        self.settings, self.steps, self.seed = settings, steps, seed
        self.accelerator = accelerator

    @property
    @abstractmethod
    def stateful(self) -> Mapping[str, Any]:
        """All that changes while it trains: objects with state_dict and load_state_dict."""

    @abstractmethod
    def update(self, step: int, positions: Sequence[int], numbers: Sequence[int]) -> Tensor:
        """Takes a step. Returns the losses, (len(losses),), of this process's samples.

        step: counted from 1. positions, numbers: of this process's samples, in the order of
        training and in the data set; random numbers depend on seed, step and position only.
        """

    @abstractmethod
    def preview(self) -> Tensor:
        """Returns pictures (3, H, W) in [-1, 1] that show what was learned so far."""

    @abstractmethod
    def save(self, folder: Path) -> dict[str, float]:
        """Writes the trained models into the base's folder; returns metrics."""

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of a step: a linear warm-up, then constant, then, over the last
        `decay` of the steps, linearly to 0.
        """
        settings = self.settings
        rising = min(1.0, step / max(1, settings.warmup_steps))
        falling = 1.0
        if settings.decay:
            falling = min(1.0, (self.steps - step + 1) / (settings.decay * self.steps))
        return settings.learning_rate * rising * falling

    def autocast(self) -> torch.autocast:
        """Returns a context in which operations are in bfloat16 if the settings say so."""
        kind = self.accelerator.device.type
        # graphs can't be recorded while autocast caches converted weights
        return torch.autocast(kind, torch.bfloat16, self.settings.bf16, cache_enabled=False)

    def recorded(self, module: Any, *inputs: Tensor) -> Any:
        """Returns the module, whose kernels are recorded once as CUDA graphs and then replayed, if
        one CUDA GPU trains: starting so many small kernels takes longer than they run.

        inputs: tensors of the shapes of each later call, in the same autocast context.
        """
        accelerator = self.accelerator
        if accelerator.device.type != "cuda" or accelerator.num_processes > 1:
            return module
        return torch.cuda.make_graphed_callables(module, inputs)

    def optimize(self, optimizer: Any, loss: Tensor, parameters: list[nn.Parameter]) -> None:
        """Takes an optimizer's step on a loss, with gradients of at most unit norm."""
        optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


@dataclass(slots=True)
class _Progress:
    step: int = 0
    seconds: float = 0.0


def train_part(
    part: Part, config: BaseConfig, count: int, watcher: PartWatcher, stop: Stop
) -> bool:
    """Trains a part to its last step, from its newest checkpoint on. Returns whether it got there;
    if not, a signal stopped it, and a checkpoint was written.

    count: number of samples. Raises TrainingError if a loss isn't finite.
    """
    accelerator = part.accelerator
    folder = Path(config.output) / part.name
    progress = _resume(part, folder, watcher)
    if progress.step >= part.steps:
        return True
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        history = Lines(folder / LOSSES, step=progress.step)
    order = SampleOrder([count], part.seed)
    size, world, rank = (
        part.settings.batch_size,
        accelerator.num_processes,
        accelerator.process_index,
    )
    watcher.start(part.name, progress.step, part.steps, size)
    pending: list[Tensor] = []
    last = time.monotonic()
    while progress.step < part.steps and not stop.agreed:
        step = progress.step + 1
        positions = range((step - 1) * size + rank, step * size, world)
        pending.append(part.update(step, positions, [order.sample(each) for each in positions]))
        progress.step = step
        stop.agreed = _any(accelerator, bool(stop.signal))
        ends = step == part.steps or stop.agreed
        saves = ends or step % config.checkpointing_steps == 0
        losses = None
        if saves or step % config.log_every == 0:
            values = accelerator.reduce(torch.stack(pending), "mean").cpu().numpy()
            first = step - len(pending) + 1
            pending.clear()
            losses = _means(part, values, step)
            if accelerator.is_main_process:
                history.add(
                    {"step": first + index, **dict(zip(part.losses, map(exact, row), strict=True))}
                    for index, row in enumerate(values)
                )
        now = time.monotonic()
        progress.seconds, last = progress.seconds + now - last, now
        if accelerator.is_main_process:
            if step % config.preview_steps == 0 or step == part.steps:
                _write_preview(part, folder, step)
            if saves:
                _write_checkpoint(part, folder, progress)
        watcher.step(step, losses)
    return progress.step >= part.steps


def _any(accelerator: Accelerator, value: bool) -> bool:
    if accelerator.num_processes == 1:
        return value
    flag = torch.tensor([float(value)], device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum").item() > 0)


def _means(part: Part, values: Any, step: int) -> dict[str, float]:
    means = values.mean(0)
    if not np.isfinite(means).all():
        raise TrainingError(
            f"{part.name}: a loss of the steps up to {step:,} isn't finite "
            f"({dict(zip(part.losses, means.tolist(), strict=True))}). The checkpoint before is "
            "intact. Lower its learning_rate, and run the same command again."
        )
    return dict(zip(part.losses, means.tolist(), strict=True))


def _resume(part: Part, folder: Path, watcher: PartWatcher) -> _Progress:
    checkpoint = find_checkpoint(folder, "latest", watcher.message)
    if checkpoint is None:
        return _Progress()
    path = checkpoint / _STATE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds, among them a bare UnpicklingError
        raise WeightsError(f"{path} can't be read ({error}); remove {checkpoint}") from error
    for name, each in part.stateful.items():
        each.load_state_dict(state["parts"][name])
    if state["step"] < part.steps:
        watcher.message(f"{part.name}: resuming from {checkpoint.name}")
    return _Progress(state["step"], state["seconds"])


def _write_checkpoint(part: Part, folder: Path, progress: _Progress) -> None:
    state = {
        "step": progress.step,
        "seconds": progress.seconds,
        "parts": {name: each.state_dict() for name, each in part.stateful.items()},
    }

    def fill(partial: Path) -> None:
        with (partial / _STATE).open("wb") as file:
            torch.save(state, file)
        write_file_list(partial)

    write_folder_atomically(folder / checkpoint_name(progress.step), fill)
    steps = [step_of(path.name) or 0 for path in checkpoints(folder)]
    for step in expired(steps, progress.step, _LIMIT):
        remove_checkpoint(folder / checkpoint_name(step))


def _write_preview(part: Part, folder: Path, step: int) -> None:
    from PIL import Image

    pixels = ((part.preview().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    target = folder / PREVIEWS / f"{step:06d}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(partial, format="png")
    partial.replace(target)
