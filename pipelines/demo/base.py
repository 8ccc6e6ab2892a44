"""`make base`: a small base model from nothing: synthetic people → shards → base.

If it is interrupted, the same command continues: each step skips what exists already.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from pipelines.demo.commands import print_step, run_command


@dataclass(frozen=True, slots=True, kw_only=True)
class _Preset:
    """people, pictures, side: see `pipelines.cli synthesize`. dataset: further settings of it."""

    people: int
    pictures: int
    side: int
    dataset: tuple[str, ...] = ()


PRESETS: Final = {
    "smoke": _Preset(people=48, pictures=2, side=256, dataset=("shard_size=48",)),
    "cpu": _Preset(people=2500, pictures=2, side=256),
    "gpu": _Preset(
        people=6000, pictures=2, side=512, dataset=("shard_size=500", "resize.size=256")
    ),
}
_SEED: Final = 17  # of the people


def main(
    output: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/base"),
    preset: Annotated[
        Literal["smoke", "cpu", "gpu"],
        typer.Option(help="smoke: minutes, a test; cpu: two cores; gpu: one GPU or more."),
    ] = "cpu",
    processes: Annotated[
        int, typer.Option(min=1, help="Processes that train, one for each GPU.")
    ] = 1,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Of the training, such as rounds=2."),
    ] = None,
) -> None:
    """Synthetic people → shards → autoencoder, towers and denoiser, in diffusers' layout."""
    started, chosen = time.time(), PRESETS[preset]
    photos, data = output / "people", output / "dataset"
    print_step(1, 3, f"{chosen.people} synthetic people, up to {chosen.pictures} pictures of each")
    run_command(
        "pipelines.cli",
        f"synthesize --people {chosen.people} --pictures {chosen.pictures} --side {chosen.side}"
        f" --seed {_SEED}",
        str(photos),
    )
    print_step(2, 3, "pictures → FGID shards and a report")
    run_command(
        "pipelines.cli",
        "run --config configs/dataset/people.yaml",
        f"source.path={photos}",
        f"output={data}",
        *chosen.dataset,
    )
    print_step(3, 3, "shards → autoencoder, CLIP towers, denoiser")
    launcher = "" if processes == 1 else f"torch.distributed.run --nproc-per-node {processes} -m "
    run_command(
        f"{launcher}train.base_model",
        f"run --config configs/base/{preset}.yaml",
        f"data={data}",
        f"output={output}",
        *(settings or ()),
    )
    typer.echo(
        f"\nbase made in {(time.time() - started) / 60:.1f} minutes: {output / 'base'}; "
        f"see {output / 'index.html'} and {data / 'report/index.html'}"
    )


if __name__ == "__main__":
    typer.run(main)
