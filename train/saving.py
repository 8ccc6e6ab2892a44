"""What a checkpoint and OUT/final hold of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.training import TrainConfig
from train.card import CARD, model_card
from train.checkpoints import write_folder_atomically
from train.mixture import Mixture
from train.optimization import Optimization
from train.outcome import Progress
from train.resume import Samples, metadata
from train.sharding import take_part
from train.state import AdapterExtras, Snapshot, random_state
from train.step import TrainedModel
from train.writer import CheckpointWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class Saver:
    """Copies the state of a run for checkpoints, which a thread writes.

    output, base: of the run. start: see train.resume.start_of_run. mixture: its data. writer: None
    on processes other than the main one.
    """

    config: TrainConfig
    output: Path
    base: str
    samples: Samples
    start: str
    mixture: Mixture
    trained: TrainedModel
    optimization: Optimization
    accelerator: Any
    writer: CheckpointWriter | None

    def save(self, progress: Progress, spikes: Mapping[str, Any]) -> None:
        """Copies the state, and begins to write it. All processes must call it together.

        spikes: what the records hold of them.
        """
        from accelerate.utils import gather_object

        random: list[dict[str, Any]] = gather_object([random_state()])
        scaler, state = self.accelerator.scaler, self.optimization.state_dict()
        if self.writer is None:
            take_part((self.trained.adapter.state_dict(), state))
            return
        self.writer.save(
            progress.step,
            lambda: self._snapshot(
                progress,
                {},
                **state,
                random=random,
                spikes=spikes,
                scaler=scaler.state_dict() if scaler else {},
            ),
        )

    def write_final(self, progress: Progress, losses: Mapping[str, Any]) -> Path | None:
        """Writes OUT/final in the main process, with the averaged weights if there is an average,
        and a model card; returns it, and None in other processes. All processes must call it
        together.

        losses: of `train.history.summarise`; the other processes have none.
        """
        if self.writer is None:
            take_part({**self.trained.adapter.state_dict(), **self.optimization.averaged()})
            return None
        snapshot = self._snapshot(progress, self.optimization.averaged())
        card = model_card(self.config, self.mixture, self.trained.adapter, self.output, losses)

        def write(folder: Path) -> None:
            snapshot.write_adapter(folder)
            (folder / CARD).write_text(card, encoding="utf-8")

        return write_folder_atomically(self.output / "final", write)

    def _snapshot(
        self, progress: Progress, weights: Mapping[str, Tensor], **state: Any
    ) -> Snapshot:
        """weights: some of the adapter's, to be written in place of those that it has now."""
        values = {**asdict(progress), **state}
        return Snapshot(self.trained, self._extras(progress), values, weights)

    def _extras(self, progress: Progress) -> AdapterExtras:
        base = self.base
        if Path(base).is_relative_to(self.output):
            # relative to the adapter's folder, so that the run can be moved
            base = os.path.relpath(base, self.output / "final")
        return AdapterExtras(
            metadata={
                "step": progress.step,
                "position": progress.position,
                "base": base,
                **metadata(self.config, self.samples, self.start),
            },
            dataset=self.mixture.dataset_config(),
        )
