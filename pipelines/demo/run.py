"""`make demo`: runs the whole pipeline once, on real faces, with the commands a user would type.

If it is interrupted, the same command continues: each step skips what exists already.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from pipelines.demo.commands import print_step, run_command

# What comes after `python -m` to train, and settings for it.
LAUNCHERS: Final[dict[str, tuple[str, list[str]]]] = {
    "python": ("train.cli", []),
    "accelerate": ("accelerate.commands.launch --num_processes 1 -m train.cli", []),
    "ray": ("train.cli", ["ray.address=local", "ray.workers=1", "ray.gpus=0"]),
}
PROMPTS = ("a portrait of a person in a garden", "a person wearing a red scarf, film photograph")


def main(
    folder: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/demo"),
    count: Annotated[int, typer.Option(min=8, help="Number of synthetic portraits.")] = 64,
    steps: Annotated[int, typer.Option(help="Training steps; 0: those of the preset.")] = 0,
    launcher: Annotated[
        Literal["python", "accelerate", "ray"], typer.Option(help="What starts the training.")
    ] = "python",
) -> None:
    """Portraits → shards + report → training → portraits, then a summary.

    With another launcher, the folder's photographs and data set are used again; training and
    portraits get folders of their own.
    """
    started = time.time()
    photos, data = folder / "photos", folder / "dataset"
    ending = "" if launcher == "python" else f"-{launcher}"
    adapter, portraits = folder / f"train{ending}", folder / f"portraits{ending}"
    print_step(1, 4, f"{count} synthetic portraits, one photograph, and a set of bad files")
    run_command("pipelines.cli", f"synthesize --count {count} --seed 0 --poison", str(photos))
    print_step(2, 4, "photographs → FGID shards and a report")
    run_command(
        "pipelines.cli",
        "run --config configs/dataset/demo.yaml",
        f"source.path={photos}",
        f"output={data}",
    )
    print_step(3, 4, "shards → adapter (Stable Diffusion's classes at tiny size, random weights)")
    module, settings = LAUNCHERS[launcher]
    overrides = [f"data={data}", f"output={adapter}", *settings]
    if steps:
        overrides.append(f"max_train_steps={steps}")
    run_command(module, "run --config configs/train/demo.yaml", *overrides)
    print_step(4, 4, "one photograph and a prompt → portraits")
    prompts = [argument for prompt in PROMPTS for argument in ("--prompt", prompt)]
    run_command(
        "infer.cli",
        "--config configs/infer/demo.yaml --photo",
        str(photos / "portrait-0-00000.jpg"),
        *prompts,
        f"adapter={adapter / 'final'}",
        f"output={portraits}",
    )
    typer.echo("\n" + "\n".join(_summary(data, adapter, portraits, time.time() - started)))


def _summary(data: Path, adapter: Path, portraits: Path, seconds: float) -> list[str]:
    stats: dict[str, Any] = json.loads((data / "report/stats.json").read_text(encoding="utf-8"))
    training: dict[str, Any] = json.loads((adapter / "summary.json").read_text(encoding="utf-8"))
    ledger, images_per_second = stats["data"], stats["runs"]["images_per_second"]
    loss = training["noise_loss"]
    dropped, failed = (sum(ledger[status].values()) for status in ("dropped", "failed"))
    reasons = [
        f"              {status} {reason}: {count}"
        for status in ("dropped", "failed")
        for reason, count in ledger[status].items()
    ]
    shards = f"{len(ledger['shards'])} in {data / 'shards'}"
    if images_per_second:
        shards += f", {images_per_second:.1f} images/s"
    count = len(list(portraits.glob("portrait-*.png")))
    return [
        f"demo finished in {seconds / 60:.1f} minutes",
        f"  ledger    {ledger['inputs']} inputs = {ledger['written']} written"
        f" + {dropped} dropped + {failed} failed",
        *reasons,
        f"  shards    {shards}",
        f"  report    {data / 'report/index.html'}",
        f"  training  noise loss {loss['start']:.3f} → {loss['end']:.3f}"
        f" in {training['steps']} steps",
        f"  adapter   {adapter / 'final'}",
        f"  portraits {count} in {portraits}; see contact_sheet.png there first",
        "The model is tiny and was trained here for minutes: its portraits only show that every "
        "step works.",
    ]


if __name__ == "__main__":
    typer.run(main)
