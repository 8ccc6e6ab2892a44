"""The model card in OUT/final: what was trained on what, with which result, and what it isn't for.

It depends on the run and its data, so a run that was resumed writes the same card.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow.compute as pc

from configs.errors import PipelineError
from configs.training import TrainConfig
from model.consistentid import ConsistentID, part_of
from stages.record import Status
from stages.storage.reader import DatasetReader
from train.history import VALIDATIONS, read_lines
from train.mixture import Mixture

CARD: Final = "README.md"
_MOST: Final = 20  # licences that are listed by name
_LONGEST: Final = 100  # characters of a text from outside

_TEXT: Final = """---
library_name: diffusers
{base_model}license: other
tags: [consistentid, text-to-image, identity-preserving]
---

# {name}

A ConsistentID adapter for {spec}, mode `{mode}`: it makes portraits of the person in a photograph,
by a prompt.

    python -m infer.cli --config configs/infer/{preset}.yaml adapter=FOLDER output=ada \\
        --photo ada.jpg --prompt 'a woman reading'

## Training

| | |
| --- | --- |
| base | {base} |
| started from | {start} |
| steps | {steps:,} of {size:,} samples |
| trained parts | {parts} |
| data | {samples:,} samples, digest `{digest}` |

{metrics}
## Data and licences

{data}

The adapter is for uses that the licences of the base, of the photographs and of the models that
made the data set all allow.

## Not for

- Portraits of people who didn't agree to it, and pictures that pass as photographs of real events.
- Recognising or verifying people, and decisions about them.
- Conclusions about a person from a portrait: it shows what the base model associates with the
  photograph and the words.

It works worse for people and photographs that the data has few of. Measure it on your own before
you rely on it: `python -m infer.evaluation run --help`. The settings of the training are in
`adapter.json`.
"""


def model_card(
    config: TrainConfig,
    mixture: Mixture,
    adapter: ConsistentID,
    output: Path,
    losses: Mapping[str, Any],
) -> str:
    """Returns the text of the card, in the form of the Hugging Face hub.

    output: the run's folder. losses: of `train.history.summarise`.
    """
    model, spec = config.model, adapter.spec
    base = model.base or spec.base
    is_local = Path(base).exists() or "://" in base or base.startswith(("/", "."))
    on_hub = base.count("/") == 1 and not is_local
    base_model = f"base_model: {json.dumps(base)}\n" if on_hub else ""
    return _TEXT.format(
        name=_escaped(output.resolve().name),
        base_model=base_model,
        base=_escaped(f"a local one, {Path(base).name}" if is_local else base or spec.name),
        spec=model.spec,
        mode=model.mode,
        preset="demo" if model.spec in ("tiny", "small") else model.spec,
        start=_escaped(Path(config.adapter).name) if config.adapter else "initial weights",
        steps=losses["steps"],
        size=config.global_batch_size,
        parts=_parts(adapter),
        samples=len(mixture),
        digest=mixture.digest[:12],
        metrics=_metrics(output, losses),
        data="\n\n".join(_source(source.path, source.weight) for source in config.data),
    )


def _parts(adapter: ConsistentID) -> str:
    counts: Counter[str] = Counter()
    for name, parameter in adapter.named_parameters():
        if parameter.requires_grad:
            counts[part_of(name)] += parameter.numel()
    return ", ".join(f"{part} ({count:,} parameters)" for part, count in counts.items())


def _metrics(output: Path, losses: Mapping[str, Any]) -> str:
    noise = losses["noise_loss"]
    lines = [
        "| metric | |",
        "| --- | --- |",
        "| noise loss, mean of the first and of the last tenth of the steps | "
        f"{noise['start']:.4f}, {noise['end']:.4f} |",
    ]
    validations = [*read_lines(output / VALIDATIONS)] if (output / VALIDATIONS).is_file() else []
    if validations:
        last = validations[-1]
        lines.append(
            f"| noise loss of people whom it isn't trained on, step {last['step']:,}: with the "
            f"right person, with another | {_loss(last['right'])}, {_loss(last['swapped'])} |"
        )
    return "\n".join(lines) + "\n"


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _source(path: str, weight: float | None) -> str:
    """Returns the licences of a data set's photographs, of both splits, and of the models that made
    the data set.
    """
    name = path.rstrip("/").rpartition("/")[2]
    title = f"**{_escaped(name)}**" + (f", weight {weight:g}" if weight is not None else "")
    try:
        reader = DatasetReader(path)
        licences: Counter[str] = Counter()
        for index in reader.manifests():
            column = reader.rows(index, ["license"], Status.OK).column("license")
            for entry in pc.value_counts(column.combine_chunks()).to_pylist():
                licences[entry["values"] or "not stated"] += entry["counts"]
        weights = reader.dataset_info().get("weights", [])
    except (PipelineError, OSError):
        licences, weights = Counter(), []
    if not licences:
        return f"{title}: its licences couldn't be read when the card was written."
    stated = licences.most_common(_MOST)
    photos = ", ".join(f"{_escaped(licence)} ({count:,})" for licence, count in stated)
    others = f", and {len(licences) - _MOST:,} others" if len(licences) > _MOST else ""
    models = "".join(
        f"\n- {_escaped(each['file'])}: {_escaped(each['license'])}" for each in weights
    )
    return (
        f"{title}, licences of its photographs as their source states them: {photos}{others}."
        + (f" It was made with these models:\n{models}" if models else "")
    )


def _escaped(text: Any) -> str:
    """Returns a text from outside as one line of Markdown, without markup."""
    line = " ".join(str(text).split())[:_LONGEST]
    return re.sub(r"([\\`*_{}\[\]<>()#|!&])", r"\\\1", line)
