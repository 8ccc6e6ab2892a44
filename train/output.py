"""The output folder of a run, before it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from configs.load import dump
from configs.training import TrainConfig
from model.spec import ModelSpec
from train.base import ensure_base
from train.facts import NONFINITE, SKIPPED
from train.history import HISTORY, SHEETS, TIMES, VALIDATIONS
from train.mirror import Mirror
from train.resume import fetch_chosen
from train.segments import inherit
from train.spikes import SPIKES
from train.writer import CheckpointWriter

_PAST: Final = (HISTORY, SKIPPED, NONFINITE, SPIKES, TIMES, VALIDATIONS, f"{SHEETS}/*.jpg")


def prepare_output(
    config: TrainConfig,
    output: Path,
    spec: ModelSpec,
    checkpoint: Path | None,
    accelerator: Any,
    writer: CheckpointWriter | None,
    mirror: Mirror | None,
    message: Callable[[str], None],
) -> str:
    """Makes the output folder and, where it is needed, the tiny base; returns the base to load.

    The main process, which has a writer, makes them; the others wait for it, and fetch from a
    mirror what their machine lacks. output: the local folder. checkpoint: to resume from.
    """
    base, local = "", replace(config, output=str(output))
    if writer is not None:
        if checkpoint is not None:
            inherit(output, checkpoint, _PAST)
        base = ensure_base(local, spec, message)
        # what was accepted for this resume isn't accepted for good
        dump(replace(config, accept_changes=()), output / "config.yaml")
        writer.upload()
    accelerator.wait_for_everyone()
    if mirror is not None:
        if accelerator.is_local_main_process and writer is None:
            fetch_chosen(config, checkpoint, mirror)
        accelerator.wait_for_everyone()
    return base or ensure_base(local, spec, lambda _: None)
