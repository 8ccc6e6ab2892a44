"""Which steps of a run used a sample, and the newest checkpoint that never saw it.

It is calculated from the order of training, with the run's own indexes: it needs neither the data
set nor a list of what was read. So it also answers after a sample was removed from the data set.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import numpy as np

from configs.errors import ConfigError
from stages.storage.exclusions import removed_keys
from stages.storage.store import Store
from train.buckets import BucketOrder, in_buckets
from train.facts import NONFINITE, SKIPPED
from train.history import HISTORY, read_lines
from train.index import SampleIndex, open_index
from train.mirror import Runs, reading
from train.mixture import shard_name
from train.order import Order, SampleOrder
from train.pairs import Pairs
from train.segments import Segment, checkpoints_of, read_segments
from train.shards import INDEX

_SHOWN: Final = 12  # steps of a key that are printed, of the first and of the last


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """A step that read a sample. reference: of another sample, to which it gave the conditions;
    else it was the one to learn. remark: why the weights don't depend on it; "" if they do.
    """

    step: int
    reference: bool
    remark: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """uses: by key, in the order of steps. absent: keys that are not in the data that the run
    trained on. first_step, last_step: of the run, as far as they are recorded. first_use: the first
    step that changed the weights with one of the samples; None without one. checkpoint: the newest
    that doesn't depend on any, "" if none is left; after_step: its step. command: trains from there
    with the data as they are now, or anew without a checkpoint; "" if no step used a sample. notes:
    what the answer doesn't cover.
    """

    uses: dict[str, list[Use]]
    absent: list[str]
    first_step: int
    last_step: int
    first_use: int | None
    checkpoint: str
    after_step: int
    command: str
    notes: list[str]


def seen(output: str | Path, keys: Sequence[str], takedown: str = "") -> Seen:
    """Finds the steps of the run in `output`, a folder or fsspec URL, that used samples.

    keys: of the samples. takedown: a data set, folder or fsspec URL; the keys of its removal log
    are added. Raises ConfigError if there is no key, or if the run isn't recorded.
    """
    names = list(dict.fromkeys([*keys, *(sorted(_removed(takedown)) if takedown else ())]))
    if not names:
        raise ConfigError("no keys: give --key KEY, or --takedown DATASET")
    with reading() as runs:
        return _seen(runs, runs.open(str(output)), names, takedown)


def _seen(runs: Runs, output: Path, names: Sequence[str], takedown: str) -> Seen:
    segments = read_segments(output)
    saved = checkpoints_of(runs, output, segments)
    first, last = segments[0].step + 1, _last_step(output, segments, saved)
    spared = _Spared(output)
    uses: dict[str, list[Use]] = {name: [] for name in names}
    absent = set(names)
    for segment in segments:
        samples = _Samples(output, segment)
        end = last if segment.last_step is None else segment.last_step
        for name in names:
            if samples.numbers(name):
                absent.discard(name)
            uses[name] += samples.uses(name, end, spared)
    changing = [use.step for each in uses.values() for use in each if not use.remark]
    first_use = min(changing, default=None)
    checkpoint, after_step = _unaffected(runs, saved, segments, first_use)
    name = runs.named(str(output))
    return Seen(
        uses=uses,
        absent=[name for name in names if name in absent],
        first_step=first,
        last_step=last,
        first_use=first_use,
        checkpoint=checkpoint,
        after_step=after_step,
        command="" if first_use is None else _command(name, segments[-1], takedown, checkpoint),
        notes=_notes(segments),
    )


def _removed(data: str) -> frozenset[str]:
    store = Store(data)
    keys = removed_keys(store)
    if not keys:
        raise ConfigError(f"{data} has no removal log, or nothing was removed from it")
    return keys


def _last_step(output: Path, segments: Sequence[Segment], saved: Sequence[tuple[int, Path]]) -> int:
    """Returns the last step that is recorded. saved: the checkpoints."""
    steps = [int(line["step"]) for line in read_lines(output / HISTORY)]
    return max([segments[-1].step, *steps, *(step for step, _ in saved)])


def _unaffected(
    runs: Runs,
    saved: Sequence[tuple[int, Path]],
    segments: Sequence[Segment],
    first_use: int | None,
) -> tuple[str, int]:
    """Returns the newest checkpoint from before a step, and its step; "" and 0 if there is none, or
    if earlier steps aren't recorded.
    """
    for step, path in saved if not segments[0].step else ():
        if (first_use is None or step < first_use) and not runs.damage(path):
            return runs.named(str(path)), step
    return "", 0


def _command(output: str, segment: Segment, takedown: str, checkpoint: str) -> str:
    """Returns the command that trains on the data sets as they are now."""
    settings = [f"output={output}-cleaned"]
    if work := segment.settings["work_folder"]:  # it has the checkpoints of this run
        settings.append(f"work_folder={work}-cleaned")
    if len(sources := segment.settings["data"]) == 1:
        settings.insert(0, f"data={takedown or sources[0]['path']}")
    if checkpoint:
        settings += [f"resume_from_checkpoint={checkpoint}", "accept_changes=data"]
    words = ["python", "-m", "train.cli", "run", "--config", f"{output}/config.yaml", *settings]
    return shlex.join(words)


def _notes(segments: Sequence[Segment]) -> list[str]:
    first, settings = segments[0], segments[0].settings
    notes = []
    if first.step:
        notes.append(
            f"Steps 1 to {first.step:,} are not recorded: they may have used the samples. All "
            "checkpoints come after them."
        )
    if any(_shows_people(segment.settings) for segment in segments):
        notes.append(
            "The run validated: validation/, report/ and logs/ in its output, and Weights & Biases "
            "with report_to=wandb, show photographs of people on the validation side. The steps "
            "above tell nothing about those."
        )
    if settings["adapter"]:
        notes.append(f"The run began with adapter={settings['adapter']}: see what that has seen.")
    return notes


def _shows_people(settings: Mapping[str, Any]) -> bool:
    validates = settings.get("validation_steps")  # missing in files of older versions
    return bool(validates and settings["validation"]["portraits"])


class _Spared:
    """Which steps didn't change the weights, or not with a sample."""

    def __init__(self, output: Path) -> None:
        lines = read_lines(output / SKIPPED)
        self._left_out = {(line["step"], line["key"], line["shard"]) for line in lines}
        self._steps = {line["step"] for line in read_lines(output / NONFINITE)}

    def remark(self, step: int, pair: Sequence[tuple[str, str]]) -> str:
        """Returns why a step didn't change the weights with a pair of samples; "" if it did.

        pair: key and shard of each.
        """
        if any((step, *names) in self._left_out for names in pair):
            return "left out: could not be read"
        return "the update was skipped" if step in self._steps else ""


class _Samples:
    """The samples of a segment, from its indexes. Raises ConfigError if one is missing."""

    def __init__(self, output: Path, segment: Segment) -> None:
        self._segment = segment
        self._indexes = [_opened(output / INDEX / name) for name in segment.indexes]
        sizes = [len(index) for index in self._indexes]
        self._first = [0, *accumulate(sizes)]  # number of each data set's first sample
        weights = [source["weight"] for source in segment.settings["data"]]
        seed = segment.settings["seed"]
        order = SampleOrder(sizes, seed, None if None in weights else weights)
        self._order: Order = order
        if segment.buckets:
            pixels = [index.pixels() for index in self._indexes]
            buckets = in_buckets(pixels, segment.buckets, segment.batch.size)
            self._order = BucketOrder(buckets, sizes, order.slots, seed)
        self._pairs = Pairs(self._order, self._others, segment.settings["pair_prob"])

    def numbers(self, key: str) -> list[int]:
        """Returns the numbers of the samples with a key: one for each data set that has it."""
        own = [index.number(key) for index in self._indexes]
        firsts = zip(self._first, own, strict=False)
        return [first + number for first, number in firsts if number is not None]

    def uses(self, key: str, last_step: int, spared: _Spared) -> list[Use]:
        """Returns the steps of the segment, up to `last_step`, that used the samples with a key."""
        segment, uses = self._segment, []
        end = segment.position + (last_step - segment.step) * segment.batch.size
        for number in self.numbers(key):
            for positions, is_reference in (
                (self._order.positions(number, end), False),
                (self._pairs.positions(number, end), True),
            ):
                for position in positions:
                    if position >= segment.position:
                        step = segment.step_at(position)
                        pair = (self._order.sample(position), self._pairs.reference(position))
                        remark = spared.remark(step, [self._names(each) for each in pair])
                        uses.append(Use(step=step, reference=is_reference, remark=remark))
        return sorted(uses, key=lambda use: use.step)

    def _names(self, number: int) -> tuple[str, str]:
        """Returns key and shard of a sample, as the mixture names them."""
        index, own = self._place(number)
        source = self._segment.settings["data"][self._indexes.index(index)]
        return index.key(own), shard_name(index.tar(own), source["path"], len(self._indexes))

    def _others(self, number: int) -> list[int]:
        index, own = self._place(number)
        return [number - own + other for other in index.others(own)]

    def _place(self, number: int) -> tuple[SampleIndex, int]:
        """Returns the index that has a sample, and its number there."""
        part = int(np.searchsorted(self._first, number, side="right")) - 1
        return self._indexes[part], number - self._first[part]


def _opened(path: Path) -> SampleIndex:
    index = open_index(path, path.stem)
    if index is None:
        raise ConfigError(
            f"{path} is missing or damaged. It lists the samples that the run trained on: restore "
            "it from a copy of the run's output."
        )
    return index


def as_json(answer: Seen) -> str:
    return json.dumps(asdict(answer), indent=1)


def as_text(answer: Seen) -> str:
    """Returns an answer for people."""
    lines = [f"steps {answer.first_step:,} to {answer.last_step:,} of the run"]
    for key, uses in answer.uses.items():
        absent = key in answer.absent
        lines.append(f"{key}: {'not among the samples of the run' if absent else _counts(uses)}")
    lines += answer.notes
    if answer.first_use is None:
        return "\n".join([*lines, "No step changed the weights with these samples."])
    lines.append(f"The first step that changed the weights with one of them: {answer.first_use:,}")
    lines.append(
        f"The newest checkpoint that depends on none of them: {answer.checkpoint}"
        if answer.checkpoint
        else "No checkpoint is left that depends on none of them."
    )
    where = "from there" if answer.checkpoint else "anew"
    lines.append(f"To train {where} on the cleaned data:\n  {answer.command}")
    return "\n".join(lines)


def _counts(uses: Sequence[Use]) -> str:
    """Returns how often a sample was used, when, and which of it had no effect."""
    if not uses:
        return "no step"
    texts = []
    for is_reference, role in ((False, "to learn"), (True, "as the reference of another")):
        own = [use for use in uses if use.reference == is_reference]
        if own:
            steps = [f"{use.step:,}{f' ({use.remark})' if use.remark else ''}" for use in own]
            if len(steps) > 2 * _SHOWN:
                steps = [*steps[:_SHOWN], f"… {len(steps) - 2 * _SHOWN} more …", *steps[-_SHOWN:]]
            count = f"{len(own):,} step{'s' if len(own) > 1 else ''}"
            ends = f"first {own[0].step:,}, last {own[-1].step:,}"
            texts.append(f"{count} {role}, {ends}: {', '.join(steps)}")
    return "; ".join(texts)
