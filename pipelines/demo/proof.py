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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from pipelines.demo.commands import print_step, run_command

_SEED: Final = 29  # of the people; `make base` uses 17
_ALL: Final = "losses,portraits,calibration,regions,attention,texts,copying"
_SEED_MEASURES: Final = "losses,portraits,regions,attention,texts"
_SHORT: Final = "losses,portraits"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Preset:
    """people: generated. seeds: of the main claim. variants: whether to train the ablations too, at
    `share` of the steps. steps: of an adapter's training; images: portraits of each person.
    """

    people: int
    held_out: float
    measured: int
    seeds: int
    seeds_of_variants: int
    steps: int
    images: int
    portraits: tuple[str, ...] = ()


PRESETS: Final = {
    "smoke": _Preset(
        people=64, held_out=0.3, measured=12, seeds=1, seeds_of_variants=1, steps=120, images=1
    ),
    "cpu": _Preset(
        people=900, held_out=0.1, measured=50, seeds=3, seeds_of_variants=1, steps=1200, images=4
    ),
    "gpu": _Preset(
        people=6000, held_out=0.02, measured=50, seeds=3, seeds_of_variants=3, steps=8000, images=4
    ),
}

# name → settings of the training that differ, and what is measured
VARIANTS: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    "untrained": (("max_train_steps=1", "optim.learning_rate=1e-12"), "losses,attention"),
    "no-localisation": (("loss.facial_weight=0",), "losses,portraits,attention"),
    "no-projector": (("model.without=[projector]",), _SHORT),
    "no-facial-encoder": (("model.without=[facial_encoder]",), _SHORT),
    "no-lora": (("model.without=[lora]",), _SHORT),
    "legacy": (("model.mode=legacy",), _SHORT),
    "paired": (("pair_prob=0.5",), "losses,portraits,copying"),
}


def main(
    output: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/learn-proof"),
    preset: Annotated[
        Literal["smoke", "cpu", "gpu"],
        typer.Option(help="smoke: minutes; cpu: 90 minutes on two cores; gpu: one GPU."),
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
    runs = [run for run in _runs(chosen) if not only or run[0] in only.split(",")]
    for number, (name, settings, measures) in enumerate(runs, 1):
        print_step(2, 3, f"adapter {number} of {len(runs)}: {name}")
        adapter = output / "adapters" / name
        model = [f"model.base={base}"] if base else []
        run_command(
            "train.cli",
            "run --config configs/train/small.yaml",
            f"data={data}",
            f"output={adapter}",
            f"max_train_steps={chosen.steps}",
            *model,
            *settings,
        )
        run_command(
            "infer.evaluation",
            "run --config configs/evaluation/small.yaml",
            f"data={data}",
            f"output={output / 'results' / f'{name}.json'}",
            f"measures=[{measures}]",
            f"people={chosen.measured}",
            f"images={chosen.images}",
            f"portraits.adapter={adapter / 'final'}",
            *(f"portraits.{each}" for each in model),
        )
    print_step(3, 3, "claims")
    typer.echo(f"{(time.time() - started) / 60:.1f} minutes")
    run_command("infer.evaluation", "prove", str(output))


def _runs(preset: _Preset) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Yields name, settings and measures of each adapter."""
    for seed in range(1, preset.seeds + 1):
        yield f"seed-{seed}", (f"seed={seed}",), _ALL if seed == 1 else _SEED_MEASURES
    for name, (settings, measures) in VARIANTS.items():
        for seed in range(1, preset.seeds_of_variants + 1):
            ending = "" if seed == 1 else f"-{seed}"
            yield f"{name}{ending}", (*settings, f"seed={seed}"), measures


if __name__ == "__main__":
    typer.run(main)
