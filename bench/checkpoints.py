"""How long training stands still for a checkpoint, written at once and in the background.

    python -m bench.checkpoints --folder FOLDER

An adapter of about 100 MB with AdamW's state, which is twice that, is trained with gradients of
ones: a step is the optimizer's. Each round takes steps without a checkpoint, with one that is
written at once, and with one that is written by train.writer.CheckpointWriter. FOLDER should be on
the disk that runs write to.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final

import torch
import typer

from model.consistentid import ConsistentID
from model.spec import SPECS
from train.state import AdapterExtras, Snapshot
from train.step import TrainedModel
from train.writer import CheckpointWriter

_STEPS: Final = 40  # of a measurement; the checkpoint is in the first one
_EXTRAS: Final = AdapterExtras(metadata={}, dataset="")


def make_model() -> TrainedModel:
    """Returns a tiny UNet with an adapter of about 100 MB."""
    import diffusers

    spec = replace(SPECS["tiny"], identity_hidden=4096, facial_dim=512, facial_depth=8)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(48, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=spec.cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    return TrainedModel(ConsistentID(spec, unet, "corrected"), unet)


def measure(take_step: Callable[[], None], save: Callable[[], None] | None) -> tuple[float, float]:
    """Returns the seconds of the first step, after which `save` is called, and of all steps."""
    begin = time.perf_counter()
    first = 0.0
    for index in range(_STEPS):
        take_step()
        if index == 0:
            if save is not None:
                save()
            first = time.perf_counter() - begin
    return first, time.perf_counter() - begin


def main(
    folder: Annotated[Path, typer.Option(help="where checkpoints are written")],
    rounds: Annotated[int, typer.Option(help="measurements of each kind")] = 7,
) -> None:
    """Prints medians over the rounds."""
    trained = make_model()
    parameters = list(trained.adapter.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    size = sum(p.numel() * p.element_size() for p in parameters)
    optimizer.step()

    def snapshot() -> Snapshot:
        state = {"step": 1, "optimizer": optimizer.state_dict()}
        return Snapshot(trained, _EXTRAS, state, {})

    seconds: dict[str, list[tuple[float, float]]] = {"none": [], "at once": [], "background": []}
    for _ in range(rounds):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as output:
            writer = CheckpointWriter(Path(output), 1, print)
            seconds["none"].append(measure(optimizer.step, None))
            seconds["at once"].append(measure(optimizer.step, lambda w=writer: w.write(snapshot())))
            seconds["background"].append(
                measure(optimizer.step, lambda w=writer: w.save(1, snapshot))
            )
            writer.wait()
    plain = statistics.median(total for _, total in seconds["none"])
    step = plain / _STEPS
    print(
        f"adapter {size / 1e6:.0f} MB, step {1000 * step:.0f} ms, {rounds} rounds of {_STEPS} steps"
    )
    stall = {
        name: statistics.median(first for first, _ in seconds[name]) - step for name in seconds
    }
    lost = {
        name: statistics.median(total for _, total in seconds[name]) - plain for name in seconds
    }
    for name in ("at once", "background"):
        print(
            f"{name:>10}: the step is {1000 * stall[name]:.0f} ms longer, "
            f"all {_STEPS} steps {1000 * lost[name]:.0f} ms"
        )
    print(
        f"     ratio: {stall['background'] / stall['at once']:.2f} for the step, "
        f"{lost['background'] / lost['at once']:.2f} for all steps"
    )


if __name__ == "__main__":
    typer.run(main)
