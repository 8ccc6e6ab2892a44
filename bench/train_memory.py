"""How much memory a training step takes, by settings: a table in Markdown.

    python -m bench.train_memory sdxl --size 512 --precision bf16       # a CPU with 24 GB: minutes
    python -m bench.train_memory sdxl --size 1024 --micro 1 --micro 4 --also-without-checkpointing

Forward and backward pass of the trainer's step on the UNet, with gradients of all trained
parameters, at full size with random weights. Features are cached, so that VAE and image encoder
take no memory. *Measured* is the most memory of these passes: of the GPU, or of this process.
*Computed* are the moments of the optimizer, which aren't allocated: 8 bytes for each trained
parameter (AdamW), or 2 (8-bit).
"""

from __future__ import annotations

import gc
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer

from bench.bases import make_base
from bench.memory import own_peak
from bench.synthetic_person import write_people
from bench.watcher import Watcher
from configs.training import DataSource, FeaturesConfig, ModelConfig, TrainConfig
from train.data import unpacked
from train.features.make import make_features
from train.step import step_losses
from train.trainer import Trainer

_ADAMW, _ADAMW_8BIT = 8, 2  # bytes of moments for a parameter
_CARDS: Final = (24, 40, 80)  # GB
_COLUMNS: Final = (
    *("micro-batch", "checkpointing", "seconds", "measured, GB"),
    *("with AdamW", "with 8-bit AdamW", "fits"),
)
_RESERVED: Final = 1.5  # GB that CUDA, its libraries and fragments take on a card


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """measured: bytes at the peak of forward and backward pass. trained: parameters."""

    micro: int
    checkpointing: bool
    measured: float
    trained: int
    seconds: float

    def total(self, moments: int) -> float:
        """Returns GB with the optimizer's moments, of so many bytes for a parameter."""
        return (self.measured + moments * self.trained) / 1e9


def main(
    model: Annotated[str, typer.Argument(help="sd15 or sdxl; tiny tries it out.")] = "sdxl",
    size: Annotated[int, typer.Option(help="Side of the training images, pixels.")] = 1024,
    micro: Annotated[list[int] | None, typer.Option(help="Samples; may repeat.")] = None,
    also_without_checkpointing: Annotated[
        bool, typer.Option("--also-without-checkpointing", help="Measure both.")
    ] = False,
    precision: Annotated[str, typer.Option(help="no, fp16 or bf16.")] = "bf16",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    folder: Annotated[Path, typer.Option(help="For weights and data, which stay.")] = Path(
        "runs/bench-memory"
    ),
) -> None:
    """Print the table."""
    base = folder / model
    if not base.exists():
        make_base(base, model, "cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")
    config = TrainConfig(
        data=(DataSource(path=str(write_people(folder, 16))),),
        split="all",
        model=ModelConfig(spec=model, base=str(base), device=device),  # type: ignore[arg-type]
        features=FeaturesConfig(kinds=("vae", "image")),
        resolution=size,
        mixed_precision=precision,  # type: ignore[arg-type]
        num_workers=0,
        report_to="none",
    )
    make_features(config, Watcher())
    print(f"| {' | '.join(_COLUMNS)} |")
    print("| --- " * len(_COLUMNS) + "|")
    for saves in (True, False) if also_without_checkpointing else (True,):
        for samples in micro or [1]:
            print(line(measure(replace(config, gradient_checkpointing=saves), samples)), flush=True)


def measure(config: TrainConfig, samples: int) -> Row:
    """Measures the second of two passes, whose gradients are there from the first one."""
    with tempfile.TemporaryDirectory(prefix="memory-") as output, ExitStack() as stack:
        own = replace(config, output=output, global_batch_size=samples, micro_batch_size=samples)
        trainer = Trainer(own, Watcher(), stack)
        with closing(trainer._batches()) as batches:
            batch = unpacked(next(batches), trainer.preparation, trainer.device)
        on_gpu = trainer.device.type == "cuda"
        with own_peak() as memory:
            for _ in range(2):
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                began = time.perf_counter()
                losses = step_losses(trainer.model, trainer.frozen, batch, own.loss, mask=False)
                trainer.accelerator.backward(losses.total)
                losses.total.item()
                seconds = time.perf_counter() - began
        trained = sum(parameter.numel() for parameter in trainer.optimization.parameters)
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    del trainer, losses, batch
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return Row(
        micro=samples,
        checkpointing=own.gradient_checkpointing,
        measured=peak if on_gpu else memory[0] * 2**20,
        trained=trained,
        seconds=seconds,
    )


def line(row: Row) -> str:
    adamw, small = row.total(_ADAMW), row.total(_ADAMW_8BIT)
    fits = [f"{card} GB" for card in _CARDS if adamw + _RESERVED <= card]
    eight = [
        f"{card} GB (8-bit)" for card in _CARDS if small + _RESERVED <= card < adamw + _RESERVED
    ]
    cells: list[Any] = [row.micro, "yes" if row.checkpointing else "no"]
    cells.append(f"{row.seconds:.2f}")
    cells += [f"{row.measured / 1e9:.1f}", f"{adamw:.1f}", f"{small:.1f}"]
    smallest = (eight[:1] + fits[:1]) or ["none"]
    return f"| {' | '.join(map(str, [*cells, ', '.join(smallest)]))} |"


if __name__ == "__main__":
    typer.run(main)
