"""Small training runs, and their models and batches without a Trainer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor

from configs.training import DataSource, LossConfig, ModelConfig, OptimConfig, TrainConfig
from model.spec import SPECS
from train.batch_maker import BatchMaker
from train.data import TrainBatch, unpacked
from train.mixture import Mixture
from train.outcome import Outcome
from train.setup import make_models, make_preparation
from train.shards import ShardSet
from train.step import Frozen, TrainedModel
from train.trainer import train


def sources(*folders: Path) -> tuple[DataSource, ...]:
    return tuple(DataSource(path=str(folder)) for folder in folders)


def with_people(data: Path, folder: Path, people: str, *, without_shard: int | None = None) -> Path:
    """Makes a copy of a data set, in which the samples with equal letters show one person.

    people: a letter for each sample.
    """
    shutil.copytree(data, folder)
    person = dict(zip(keys(ShardSet(str(data))), people, strict=True))
    table = pq.read_table(folder / "identities.parquet")
    column = table.column_names.index("identity_id")
    identities = [f"id-{person[key]}" for key in table.column("key").to_pylist()]
    table = table.set_column(column, table.schema.field(column), [identities])
    pq.write_table(table, folder / "identities.parquet")
    if without_shard is not None:
        (folder / f"shards/fgid-{without_shard:06d}.json").unlink()
    return folder


def hold_out(data: Path, *people: str) -> Path:
    """Puts the samples of these people, of `with_people`, on the validation side, all others on the
    training side.
    """
    table = pq.read_table(data / "identities.parquet")
    of_samples = table.column("identity_id").to_pylist()
    sides = ["val" if person.removeprefix("id-") in people else "train" for person in of_samples]
    place = table.column_names.index("split")
    field = table.schema.field(place)
    pq.write_table(table.set_column(place, field, pa.array(sides)), data / "identities.parquet")
    return data


def small(
    data: Path | tuple[DataSource, ...], base: Path, output: Path | str, **changes: object
) -> TrainConfig:
    """Returns settings for ten steps of two samples at 32 pixels, on the CPU, without a worker."""
    values: dict[str, object] = {
        "data": sources(data) if isinstance(data, Path) else data,
        "output": str(output),
        "model": ModelConfig(spec="tiny", base=str(base), device="cpu"),
        "optim": OptimConfig(learning_rate=1e-3, lr_scheduler="cosine", lr_warmup_steps=2),
        "loss": LossConfig(drop_text=0.1, drop_identity=0.1, drop_both=0.1),
        "resolution": 32,
        "global_batch_size": 2,
        "micro_batch_size": 2,
        "max_train_steps": 10,
        "num_workers": 0,
        "log_every": 2,
        "seed": 3,
        "keep_samples": 8,
        "report_to": "none",
    }
    return TrainConfig(**{**values, **changes})  # type: ignore[arg-type]


class Listener:
    """A train.trainer.Watcher that records messages and losses, and calls `on_step`."""

    def __init__(self, on_step: Callable[[int], None] = lambda step: None) -> None:
        self.messages: list[str] = []
        self.losses: list[tuple[int, dict[str, float]]] = []
        self._on_step = on_step

    def message(self, text: str) -> None:
        self.messages.append(text)

    def step(self, step: int, losses: dict[str, float] | None) -> None:
        self._on_step(step)
        if losses is not None:
            self.losses.append((step, losses))


class Steps(Listener):
    """A listener that also records the progress of `make features`."""

    def start(self, name: str, step: int, total: int, batch_size: int, unit: str) -> None:
        self.messages.append(f"{name} {step} {total}")


def keys(samples: ShardSet | Mixture) -> list[str]:
    """Returns the keys of all samples, in their order."""
    return [samples.key(number) for number in range(len(samples))]


def run(config: TrainConfig, listener: Listener | None = None) -> Outcome:
    return train(config, listener or Listener())


class Parts:
    """The models and the batch maker of a run, without a Trainer."""

    def __init__(self, config: TrainConfig, mixture: Mixture) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        spec = SPECS[config.model.spec]
        self.frozen: Frozen
        self.trained: TrainedModel
        self.frozen, self.trained = make_models(
            config, spec, config.model.base, torch.device("cpu")
        )
        self.preparation = make_preparation(config, spec, self.frozen)
        self.maker = BatchMaker(mixture, mixture.order(config.seed), self.preparation)
        self._random = torch.get_rng_state()

    def make(self, positions: range) -> TrainBatch:
        return unpacked(self.maker(positions), self.preparation, "cpu")

    def copy(self) -> Parts:
        """The same models with weights of their own, and torch's random state as it was."""
        torch.set_rng_state(self._random)
        shared = (self.frozen.base.tokenizer, self.maker)
        return deepcopy(self, {id(each): each for each in shared})


def assert_same_rows(whole: TrainBatch, *parts: TrainBatch) -> None:
    """Asserts that a batch has the rows of the parts, in order."""
    for field in fields(TrainBatch):
        values = [getattr(part, field.name) for part in parts]
        if field.name in ("image_rows", "encoded_texts", "text_rows"):
            continue  # numbered within its own batch
        if isinstance(values[0], Tensor):
            torch.testing.assert_close(
                getattr(whole, field.name), torch.cat(values), rtol=0, atol=0
            )
    assert (whole.keys, whole.references) == tuple(
        sum((getattr(part, name) for part in parts), ()) for name in ("keys", "references")
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint or of OUT/final."""
    return load_file(folder / "adapter.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) for key, value in one.items()
    )
