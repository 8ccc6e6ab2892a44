"""`make learn-proof`: trains adapters on a frozen base, and measures whether they learn identity.

    OUT/people/ dataset/      people whom the base was not trained on
    OUT/adapters/NAME/        an adapter of each variant
    OUT/results/NAME.json     its measures on held-out people
    OUT/proof.json index.html the claims

If it is interrupted, the same command continues: each step skips what exists already.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from pipelines.demo.commands import print_step, run_command

_SEED: Final = 29  # of the people; `make base` uses 17


@dataclass(frozen=True, slots=True)
class _Run:
    """An adapter. settings: of its training, that differ. measures: what is measured of it."""

    name: str
    settings: tuple[str, ...]
    measures: tuple[str, ...]


_SEED_MEASURES: Final = ("losses", "portraits", "regions", "attention", "texts")
_FIRST_SEED_MEASURES: Final = (*_SEED_MEASURES, "calibration", "copying")
_SHORT: Final = ("losses", "portraits")
# Claims need the first two. The others are compared with `whole`, which has as many steps.
VARIANTS: Final = (
    _Run("untrained", ("max_train_steps=1", "optim.learning_rate=1e-12"), ("losses", "attention")),
    _Run("no-localisation", ("loss.facial_weight=0",), (*_SHORT, "attention")),
    _Run("whole", (), (*_SHORT, "attention", "texts", "copying")),
    _Run("no-projector", ("model.without=[projector]",), _SHORT),
    _Run("no-facial-encoder", ("model.without=[facial_encoder]",), _SHORT),
    _Run("no-lora", ("model.without=[lora]",), _SHORT),
    _Run("legacy", ("model.mode=legacy",), _SHORT),
    _Run("unpaired", ("pair_prob=0",), (*_SHORT, "texts", "copying")),
)


@dataclass(frozen=True, slots=True)
class _Size:
    """seeds: how many adapters of a kind. steps: of training. images: portraits of each person."""

    seeds: int
    steps: int
    images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Preset:
    """people: number to generate. held_out: share of them that no adapter is trained on. measured:
    number of the held-out people that are measured, 0 for all. main: size of the runs `seed-N`.
    others: size of the variants. measures: all that are taken. settings: of every training, before
    those of the variant.
    """

    people: int
    held_out: float
    measured: int
    main: _Size
    others: _Size
    variants: tuple[_Run, ...] = VARIANTS
    measures: tuple[str, ...] = _FIRST_SEED_MEASURES
    settings: tuple[str, ...] = ()


PRESETS: Final = {
    # Too short for portraits that resemble: what is decided is what the noise loss and the
    # attention show.
    "smoke": _Preset(
        people=120,
        held_out=0.25,
        measured=0,
        main=_Size(1, steps=320, images=1),
        others=_Size(1, steps=320, images=1),
        variants=VARIANTS[:2],
        measures=("losses", "attention"),
        # Half the samples a step, and a stronger localisation loss to learn as much from them.
        settings=("global_batch_size=8", "micro_batch_size=8", "loss.facial_weight=0.3"),
    ),
    "cpu": _Preset(
        people=600,
        held_out=0.1,
        measured=50,
        main=_Size(3, steps=1300, images=4),
        others=_Size(1, steps=400, images=1),
    ),
    "gpu": _Preset(
        people=6000,
        held_out=0.02,
        measured=50,
        main=_Size(3, steps=8000, images=4),
        others=_Size(3, steps=8000, images=4),
    ),
}


def main(
    output: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/learn-proof"),
    preset: Annotated[
        Literal["smoke", "cpu", "gpu"],
        typer.Option(help="smoke: minutes; cpu: about 75 minutes on two cores; gpu: one GPU."),
    ] = "cpu",
    only: Annotated[str, typer.Option(help="Names of variants, comma-separated; '': all.")] = "",
    base: Annotated[str, typer.Option(help="A base's folder; '': the one that is shipped.")] = "",
) -> None:
    """People → shards → adapters → measures → claims. Exit status: 0 if all claims hold."""
    started, chosen = time.time(), PRESETS[preset]
    data = output / "dataset"
    print_step(1, 3, f"{chosen.people} people whom the base was not trained on")
    run_command(
        "pipelines.cli",
        f"synthesize --people {chosen.people} --pictures 2 --side 256 --seed {_SEED}",
        str(output / "people"),
    )
    run_command(
        "pipelines.cli",
        "run --config configs/dataset/people.yaml",
        f"source.path={output / 'people'}",
        f"output={data}",
        f"global_pass.val_share={chosen.held_out}",
    )
    runs = [each for each in _runs(chosen) if not only or each[0].name in only.split(",")]
    for number, (run, size) in enumerate(runs, 1):
        print_step(2, 3, f"adapter {number} of {len(runs)}: {run.name}")
        adapter = output / "adapters" / run.name
        model = [f"model.base={base}"] if base else []
        run_command(
            "train.cli",
            "run --config configs/train/small.yaml",
            f"data={data}",
            f"output={adapter}",
            f"max_train_steps={size.steps}",
            *model,
            *chosen.settings,
            *run.settings,
        )
        run_command(
            "infer.evaluation",
            "run --config configs/evaluation/small.yaml",
            f"data={data}",
            f"output={output / 'results' / f'{run.name}.json'}",
            f"measures=[{','.join(each for each in run.measures if each in chosen.measures)}]",
            f"people={chosen.measured}",
            f"images={size.images}",
            f"portraits.adapter={adapter / 'final'}",
            *(f"portraits.{each}" for each in model),
        )
    print_step(3, 3, "claims")
    typer.echo(f"{(time.time() - started) / 60:.1f} minutes")
    run_command("infer.evaluation", "prove", str(output))


def _runs(preset: _Preset) -> Iterator[tuple[_Run, _Size]]:
    for seed in range(1, preset.main.seeds + 1):
        measures = _FIRST_SEED_MEASURES if seed == 1 else _SEED_MEASURES
        yield _Run(f"seed-{seed}", (f"seed={seed}",), measures), preset.main
    for run in preset.variants:
        for seed in range(1, preset.others.seeds + 1):
            name = run.name if seed == 1 else f"{run.name}-{seed}"
            yield replace(run, name=name, settings=(*run.settings, f"seed={seed}")), preset.others


if __name__ == "__main__":
    typer.run(main)
