"""OUT/data.jsonl: on what a run trained, and how. A line for each start and each resume.

A segment is the steps from one start or resume to the next: they have the same data, settings and
processes. With the segments, the samples of every step can be computed, also after the data set has
changed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch

from configs.errors import ConfigError
from configs.load import load_text
from configs.training import TrainConfig
from model.checkpoint import CONFIG_FILE
from model.pixels import Size
from train.batches import BatchPlan
from train.checkpoints import checkpoints, set_aside, sync
from train.history import Lines, read_lines
from train.mirror import Runs
from train.mixture import Mixture
from train.outcome import Progress
from train.resume import origin
from train.shards import INDEX

DATA: Final = "data.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """step, position: how many steps and samples were before it. data, indexes: for each data set,
    the digest of its samples and the name of its index in OUT/index. digest: of all data sets,
    which checkpoints have too. settings: of the run, as plain values. processes, micro_batch: how
    many processes there were, and samples of a micro-batch. threads: of torch. device, torch: name
    and version. resumed_from: folder or URL of the checkpoint; "" for a new run. last_step: of the
    segment; None while no later one is known. features: names of those that were read.
    buckets: width and height of each; () if the samples were not in buckets. sample_flops: see
    train/flops.py; 0 in the files of older versions.
    """

    step: int
    position: int
    data: tuple[str, ...]
    indexes: tuple[str, ...]
    digest: str
    settings: dict[str, Any]
    processes: int
    micro_batch: int
    threads: int
    device: str
    torch: str
    resumed_from: str = ""
    last_step: int | None = None
    features: tuple[str, ...] = ()
    buckets: tuple[Size, ...] = ()
    sample_flops: int = 0

    @property
    def batch(self) -> BatchPlan:
        """How the samples of each step were divided."""
        size = int(self.settings["global_batch_size"])
        accumulation = size // self.processes // self.micro_batch
        return BatchPlan(size, self.micro_batch, accumulation, self.processes)

    def config(self) -> TrainConfig:
        """Returns the settings. Raises ConfigError if this version doesn't have one of them."""
        return load_text(TrainConfig, json.dumps(self.settings))

    def positions(self, step: int) -> range:
        """Returns the positions of the samples of a step."""
        start = self.position + (step - 1 - self.step) * self.batch.size
        return range(start, start + self.batch.size)

    def step_at(self, position: int) -> int:
        """Returns the step that trained on the sample at a position."""
        return self.step + 1 + (position - self.position) // self.batch.size


def new_segment(
    config: TrainConfig,
    progress: Progress,
    batch: BatchPlan,
    mixture: Mixture,
    device: torch.device,
    checkpoint: Path | None,
    *,
    features: tuple[str, ...] = (),
    buckets: tuple[Size, ...] = (),
    sample_flops: int = 0,
) -> Segment:
    """Returns the segment that a run begins, on this machine. checkpoint: that it resumes from."""
    return Segment(
        step=progress.step,
        position=progress.position,
        data=mixture.digests,
        indexes=mixture.index_files,
        digest=mixture.digest,
        settings=asdict(config),
        processes=batch.world,
        micro_batch=batch.micro,
        threads=torch.get_num_threads(),
        device=device_name(device),
        torch=torch.__version__,
        resumed_from=origin(config, checkpoint),
        features=features,
        buckets=buckets,
        sample_flops=sample_flops,
    )


def device_name(device: torch.device) -> str:
    """Returns the name of the GPU, or the device's kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def add_segment(output: Path, segment: Segment) -> None:
    """Records that a run starts or resumes. Lines of later steps are removed."""
    line = asdict(segment)
    del line["last_step"]
    Lines(output / DATA, step=segment.step).add([line])


def read_segments(output: Path) -> list[Segment]:
    """Returns the segments that have steps, and the last one, in order. Raises ConfigError if there
    is none, or if another version wrote them.
    """
    try:
        segments = [Segment(**_without_lists(line)) for line in read_lines(output / DATA)]
    except (TypeError, KeyError) as error:
        raise ConfigError(
            f"{output / DATA} was written by another version ({type(error).__name__}: {error}). "
            "Use the version that trained."
        ) from error
    if not segments:
        raise ConfigError(
            f"{output / DATA} is missing or empty, so it isn't recorded on what this run trained. "
            "Give the output of a run; runs of version 0.1 have no such file."
        )
    following = [*(segment.step for segment in segments[1:]), None]
    closed = [replace(s, last_step=last) for s, last in zip(segments, following, strict=True)]
    return [segment for segment in closed if segment.last_step != segment.step]


def _without_lists(line: dict[str, Any]) -> dict[str, Any]:
    return {n: tuple(value) if isinstance(value, list) else value for n, value in line.items()}


def segment_of(segments: Sequence[Segment], step: int) -> Segment:
    """Returns the segment that has a step. Raises ConfigError if none has it."""
    for segment in segments:
        if segment.step < step and (segment.last_step is None or step <= segment.last_step):
            return segment
    first = segments[0].step + 1
    raise ConfigError(f"step {step}: expected one of the steps from {first} on, which are recorded")


def checkpoints_of(runs: Runs, output: Path, segments: Sequence[Segment]) -> list[tuple[int, Path]]:
    """Returns step and folder of each checkpoint of these segments, newest first: those in `output`
    and those in the outputs from which the run was resumed. Left out are those that were written
    with other data than the segments say, which a run that began again at an older one leaves.
    """
    folders: list[tuple[Path, int | None]] = [(output, None)]
    for segment in segments:
        if segment.resumed_from:
            past = segment.resumed_from.rpartition("/")[0]
            folders.append((runs.with_checkpoints(past), segment.step))
    paths: dict[int, Path] = {}
    for folder, last_step in folders:
        for path in checkpoints(folder):
            step = int(path.name.rpartition("-")[2])
            if last_step is None or step <= last_step:
                paths.setdefault(step, path)
    first = segments[0].step
    return [
        (step, path)
        for step, path in sorted(paths.items(), reverse=True)
        if step > first and _metadata(path).get("data") == segment_of(segments, step).digest
    ]


def _metadata(checkpoint: Path) -> dict[str, Any]:
    """Returns the contents of a checkpoint's adapter.json; {} if it can't be read."""
    try:
        return dict(json.loads((checkpoint / CONFIG_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def inherit(output: Path, checkpoint: Path, names: Sequence[str]) -> None:
    """Copies the past of a checkpoint's weights from the run that wrote it, if that isn't the run
    in `output`: the files called `names`, which may be patterns, the indexes of the data, and the
    tiny base. If it is, sets the later checkpoints aside.
    """
    past = checkpoint.parent
    if past.resolve() == output.resolve():
        set_aside(output, _metadata(checkpoint)["step"])
        return
    patterns = (DATA, *names, f"{INDEX}/*.arrow")
    for source in chain.from_iterable(map(past.glob, patterns)):
        target = output / source.relative_to(past)
        if source.suffix == ".jsonl":
            _copy(source, target)
            Lines(target, step=_metadata(checkpoint)["step"])  # without later steps
        elif not target.exists():
            target.parent.mkdir(exist_ok=True)
            _copy(source, target)
    if (past / "base").is_dir() and not (output / "base").exists():
        partial = output / f".base.{os.getpid()}.partial"
        shutil.copytree(past / "base", partial)
        partial.rename(output / "base")


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    shutil.copyfile(source, partial)
    sync(partial)
    partial.replace(target)
