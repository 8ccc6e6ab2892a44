"""Replay: the losses of a step, computed again from its samples, noise and timesteps.

If a checkpoint has the weights that the step began with, the loss has the bits of the recorded one,
however many processes trained.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from rich.console import Console
from rich.table import Table

from configs.errors import ConfigError, ShardError
from configs.training import TrainConfig
from model.checkpoint import load_adapter
from model.pixels import training_image
from model.spec import spec_named
from stages.backends.runtime import deterministic_algorithms, pin_threads
from train.batch_maker import BatchMaker
from train.data import Preparation, unpacked
from train.features.reading import FeatureSet, open_features
from train.history import HISTORY, exact, read_lines
from train.losses import FetchedLosses, joined, losses_of_process
from train.mirror import Runs, reading
from train.mixture import Mixture, open_mixture
from train.packing import PackedBatch
from train.segments import Segment, checkpoints_of, device_name, read_segments, segment_of
from train.setup import make_buckets, make_models, make_preparation
from train.shards import INDEX
from train.step import LOSSES, Frozen, StepLosses, TrainedModel, masks_background, step_losses


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLoss:
    """reference: key of the sample that gave the conditions, which is mostly this one. losses: the
    LOSSES by name, None where not finite. left_out: why the sample was left out; "" if it wasn't.
    """

    key: str
    shard: str
    reference: str
    timestep: int
    losses: dict[str, float | None]
    left_out: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """checkpoint: whose weights were used, "" for the initial ones; after_step: their step. loss
    and recorded: of the step; None if it isn't finite, or not recorded. equal: whether they have
    equal bits. samples: by loss, highest first. notes: what may keep the two from being equal.
    """

    step: int
    checkpoint: str
    after_step: int
    loss: float | None
    recorded: float | None
    equal: bool
    samples: list[SampleLoss]
    notes: list[str]


def replay(output: str | Path, step: int, *, images: Path | None = None) -> Replay:
    """Computes the losses of a step of the run in `output`, a folder or fsspec URL. The run may
    continue meanwhile.

    images: a folder that gets the pictures that the step trained on. Raises ConfigError for a step
    that isn't recorded, or if its data have changed since, and what training raises.
    """
    with reading() as runs:
        return _replay(runs, runs.open(str(output)), step, images)


def _replay(runs: Runs, output: Path, step: int, images: Path | None) -> Replay:
    segments = read_segments(output)
    segment = segment_of(segments, step)
    config = replace(segment.config(), output=str(output))
    if step > config.max_train_steps:
        raise ConfigError(f"step {step}: the run has {config.max_train_steps} steps")
    pin_threads(segment.threads)
    mixture = _open(config, output)
    if mixture.digest != segment.digest:
        raise ConfigError(
            f"{mixture} has changed since step {step} was trained, so the step can't be "
            "computed again. `python -m train.cli seen` works without the samples."
        )
    with deterministic_algorithms(config.deterministic):
        features = {
            name: each
            for name, each in open_features(config, mixture, None, lambda _: None).items()
            if each.name in segment.features
        }
        run = _Models(config, output, features, mixture)
        order = mixture.order(config.seed, run.preparation.buckets)
        saved = checkpoints_of(runs, output, segments)
        checkpoint, after_step = run.load_weights(runs, saved, step, segments)
        plan, positions = segment.batch, segment.positions(step)
        make = BatchMaker(mixture, order, run.preparation, features)
        batches = [
            make(positions[start : start + plan.micro]) for start in range(0, plan.size, plan.micro)
        ]
        losses = run.losses(batches, step)
    # micro-batch m of a step went to process m mod W
    parts = [losses_of_process(losses[rank :: plan.world]) for rank in range(plan.world)]
    fetched = joined(torch.stack(parts)[:, None], plan.accumulation)
    numbers = [order.sample(position) for position in positions]
    samples = _samples(fetched, [mixture.shard_of(number) for number in numbers], batches)
    ranks = _by_loss(samples)
    if images is not None:
        pictures = _pictures(mixture, numbers, run.preparation)
        _save_images(images, [(samples[rank], pictures[rank]) for rank in ranks])
    loss, recorded = exact(fetched.values[0, 0]), _recorded(output, step)
    return Replay(
        step=step,
        checkpoint=runs.named(str(checkpoint or "")),
        after_step=after_step,
        loss=loss,
        recorded=recorded,
        equal=loss is not None and loss == recorded,
        samples=[samples[rank] for rank in ranks],
        notes=_notes(segment, step, after_step, run.accelerator.device, [*features.values()]),
    )


def _open(config: TrainConfig, output: Path) -> Mixture:
    """Opens the data of a run with its indexes. If these don't fit the data any more, others are
    made in a temporary folder.
    """
    with tempfile.TemporaryDirectory(prefix="index-") as folder:
        for path in (output / INDEX).glob("*.arrow"):
            Path(folder, path.name).symlink_to(path.absolute())
        return open_mixture(config, Path(folder))


class _Models:
    """The models of a run, made as the trainer makes them."""

    def __init__(
        self,
        config: TrainConfig,
        output: Path,
        features: Mapping[str, FeatureSet],
        mixture: Mixture,
    ) -> None:
        self.config = config
        self.accelerator = Accelerator(
            cpu=config.model.device == "cpu", mixed_precision=config.mixed_precision
        )
        spec = spec_named(config.model.spec, config.model.without)
        base = config.model.base or spec.base or str(output / "base")
        self.frozen: Frozen
        self.trained: TrainedModel
        self.frozen, self.trained = make_models(
            config, spec, base, self.accelerator.device, features=features
        )
        buckets = make_buckets(config, mixture, self.frozen.base)
        self.preparation: Preparation = make_preparation(config, spec, self.frozen, buckets)

    def load_weights(
        self, runs: Runs, saved: list[tuple[int, Path]], step: int, segments: list[Segment]
    ) -> tuple[Path | None, int]:
        """Loads the newest weights from before a step. Returns their checkpoint, None for the
        initial ones, and its step. saved: all checkpoints. Raises ConfigError if there are none.
        """
        for after_step, path in saved:
            if after_step < step and not runs.fetch(path):
                load_adapter(path, self.trained.adapter)
                return path, after_step
        if segments[0].step:
            raise ConfigError(
                f"step {step}: no checkpoint before it is left, and the run did not begin with "
                f"initial weights, but at step {segments[0].step}"
            )
        return None, 0

    def losses(self, batches: list[PackedBatch], step: int) -> list[StepLosses]:
        """Returns the losses of the micro-batches of a step."""
        config, device = self.config, self.accelerator.device
        model = self.accelerator.prepare(self.trained)
        count = torch.tensor(float(sum(int(batch.valid.sum()) for batch in batches)), device=device)
        mask = masks_background(config.loss, config.seed, step)
        losses = []
        for batch in batches:
            # with gradients, as in training: without, torch may choose other kernels
            of_batch = step_losses(
                model,
                self.frozen,
                unpacked(batch, self.preparation, device),
                config.loss,
                mask=mask,
                count=count,
            )
            losses.append(replace(of_batch, total=of_batch.total.detach()))
        return losses


def _samples(
    fetched: FetchedLosses, shards: list[str], batches: list[PackedBatch]
) -> list[SampleLoss]:
    """Returns the samples of a step by position. shards: the tar of each."""
    rows = [
        (key, reference, not valid, batch)
        for batch in batches
        for key, reference, valid in zip(
            batch.keys, batch.references, batch.valid.tolist(), strict=True
        )
    ]
    return [
        SampleLoss(
            key=key,
            shard=shard,
            reference=reference,
            timestep=int(timestep),
            losses=dict(zip(LOSSES, map(exact, errors), strict=True)),
            left_out="; ".join(bad.reason for bad in batch.bad if bad.key in (key, reference))
            if is_bad
            else "",
        )
        for shard, (key, reference, is_bad, batch), timestep, errors in zip(
            shards, rows, fetched.timesteps[0], fetched.errors[0], strict=True
        )
    ]


def _by_loss(samples: list[SampleLoss]) -> list[int]:
    """Returns the indices of the samples: those whose loss isn't finite first, then by loss, the
    highest first; those that were left out last.
    """

    def rank(index: int) -> tuple[bool, float]:
        loss = samples[index].losses["loss"]
        return bool(samples[index].left_out), -float("inf") if loss is None else -loss

    return sorted(range(len(samples)), key=rank)


def _pictures(mixture: Mixture, numbers: Sequence[int], preparation: Preparation) -> list[Any]:
    """Returns the pictures of samples, (H, W, 3) uint8; a black one where it can't be read."""
    pictures = []
    for number, record in zip(numbers, mixture.records(numbers), strict=True):
        width, height = size = preparation.size(number)
        try:
            if isinstance(record, ShardError):
                raise record
            pictures.append(training_image(record, size).permute(1, 2, 0).numpy())
        except (ShardError, ValueError, OSError):
            pictures.append(np.zeros((height, width, 3), np.uint8))
    return pictures


def _save_images(folder: Path, pictures: list[tuple[SampleLoss, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for place, (sample, pixels) in enumerate(pictures, 1):
        loss = sample.losses["loss"]
        text = "left-out" if sample.left_out else "not-finite" if loss is None else f"{loss:.6f}"
        Image.fromarray(pixels).save(folder / f"{place:03d}-{sample.key}-{text}.png")


def _recorded(output: Path, step: int) -> float | None:
    """Returns the recorded loss of a step; None if it is not recorded, or was not finite."""
    lines = (line for line in read_lines(output / HISTORY) if line["step"] == step)
    loss: float | None = next(lines, {"loss": None})["loss"]
    return loss


def _notes(
    segment: Segment,
    step: int,
    after_step: int,
    device: torch.device,
    features: Sequence[FeatureSet],
) -> list[str]:
    notes = []
    if late := step - 1 - after_step:
        notes.append(
            f"the weights are {late} step{'s' if late > 1 else ''} older than those that step "
            f"{step} began with, so its loss differs from the recorded one"
        )
    if segment.features != tuple(each.name for each in features):
        notes.append(
            f"the run read the features {', '.join(segment.features) or 'none'}, which the data "
            "set doesn't have now, so the loss differs slightly"
        )
    here = (device_name(device), torch.__version__)
    if here != (segment.device, segment.torch):
        notes.append(
            f"the run used {segment.device} with torch {segment.torch}, and this is {here[0]} with "
            f"torch {here[1]}, so the last digits may differ"
        )
    return notes


def as_json(losses: Replay) -> str:
    return json.dumps(asdict(losses), indent=1)


def show(losses: Replay) -> None:
    """Prints a replay for people."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    weights = losses.checkpoint or "the initial weights"
    console.print(f"step {losses.step:,} with {weights} (after step {losses.after_step:,})")
    recorded = "not recorded" if losses.recorded is None else f"recorded {losses.recorded}"
    equal = ", all bits are equal" if losses.equal else ""
    console.print(f"loss {'not finite' if losses.loss is None else losses.loss}, {recorded}{equal}")
    for note in losses.notes:
        console.print(note)
    table = Table("key", "shard", "timestep", *LOSSES, "")
    for sample in losses.samples:
        values = [_text(sample.losses[name]) for name in LOSSES]
        remark = f"left out: {sample.left_out}" if sample.left_out else ""
        if sample.reference != sample.key:
            remark += f"{'; ' if remark else ''}conditions of {sample.reference}"
        table.add_row(sample.key, sample.shard, str(sample.timestep), *values, remark)
    console.print(table)


def _text(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.6g}"
