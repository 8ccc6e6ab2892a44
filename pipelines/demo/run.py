"""`make demo`: runs the whole pipeline once, on synthetic people, with the commands a user would
type. Base model and adapter are those that come with the project (model/small).

If it is interrupted, the same command continues: each step skips what exists already.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from model.base import key_metrics
from pipelines.demo.commands import print_step, run_command

# What comes after `python -m` to train, and settings for it.
LAUNCHERS: Final[dict[str, tuple[str, list[str]]]] = {
    "python": ("train.cli", []),
    "accelerate": ("accelerate.commands.launch --num_processes 1 -m train.cli", []),
    "ray": ("train.cli", ["ray.address=local", "ray.workers=1", "ray.gpus=0"]),
}
PROMPTS: Final = (
    "A close-up portrait of a person, smiling and showing teeth.",
    "A close-up portrait of a person with black hair, wearing glasses.",
)
HELD_OUT: Final = 0.5  # share of the people


def main(
    folder: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/demo"),
    count: Annotated[
        int, typer.Option(min=8, help="Number of synthetic people. Half of them are held out.")
    ] = 120,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 150,
    launcher: Annotated[
        Literal["python", "accelerate", "ray"], typer.Option(help="What starts the training.")
    ] = "python",
) -> None:
    """People → shards and report → training → portraits of people who were held out.

    With another launcher, the folder's photographs and data set are used again; training and
    portraits get folders of their own.
    """
    started = time.time()
    photos, data, before = folder / "photos", folder / "dataset", folder / "before.json"
    ending = "" if launcher == "python" else f"-{launcher}"
    training, portraits = folder / f"train{ending}", folder / f"portraits{ending}"
    print_step(1, 5, f"{count} synthetic people, one photograph, and a set of bad files")
    run_command(
        "pipelines.cli",
        f"synthesize --people {count} --pictures 2 --side 256 --seed 0 --poison",
        str(photos),
    )
    print_step(2, 5, "photographs → FGID shards and a report")
    run_command(
        "pipelines.cli",
        f"run --config configs/dataset/people.yaml shard_size=50 global_pass.val_share={HELD_OUT}",
        f"source.path={photos}",
        f"output={data}",
    )
    print_step(3, 5, "noise loss of held-out people, before training")
    _measure(data, before, "small", "losses")
    print_step(4, 5, "shards → adapter")
    module, settings = LAUNCHERS[launcher]
    run_command(
        module,
        f"run --config configs/train/demo.yaml max_train_steps={steps}",
        f"data={data}",
        f"output={training}",
        *settings,
    )
    print_step(5, 5, "photographs of held-out people and prompts → portraits")
    results = portraits / "contact_sheet.json"
    prompts = json.dumps(PROMPTS)
    _measure(
        data,
        results,
        str(training / "final"),
        "losses,portraits,sheet",
        f"portraits.prompts={prompts}",
    )
    typer.echo("\n" + "\n".join(_summary(data, before, training, results, time.time() - started)))


def _measure(data: Path, output: Path, adapter: str, measures: str, *settings: str) -> None:
    run_command(
        "infer.evaluation",
        f"run --config configs/evaluation/small.yaml people=0 images=2 measures=[{measures}]",
        f"data={data}",
        f"output={output}",
        f"portraits.adapter={adapter}",
        *settings,
    )


def _summary(data: Path, before: Path, training: Path, results: Path, seconds: float) -> list[str]:
    stats: dict[str, Any] = _read(data / "report/stats.json")
    ledger, images_per_second = stats["data"], stats["runs"]["images_per_second"]
    dropped, failed = (sum(ledger[status].values()) for status in ("dropped", "failed"))
    reasons = [
        f"              {status} {reason}: {count}"
        for status in ("dropped", "failed")
        for reason, count in ledger[status].items()
    ]
    shards = f"{len(ledger['shards'])} in {data / 'shards'}"
    if images_per_second:
        shards += f", {images_per_second:.1f} images/s"
    measures = _read(results)
    metrics = key_metrics(measures)
    people = len(measures["portraits"]["resemblance"]["arcface"]["people"])
    first = _read(before)["losses"]
    losses = [
        f"{label} {first[name]['mean']:.4f} → {metrics[f'loss_{name}']:.4f}"
        for name, label in (
            ("right", "right identity"),
            ("swapped", "another person's"),
            ("none", "none"),
        )
    ]
    return [
        f"demo finished in {seconds / 60:.1f} minutes",
        f"  ledger     {ledger['inputs']} inputs = {ledger['written']} written"
        f" + {dropped} dropped + {failed} failed",
        *reasons,
        f"  shards     {shards}",
        f"  report     {data / 'report/index.html'}",
        f"  adapter    {training / 'final'}",
        f"  noise loss before → after training: {', '.join(losses)}",
        f"  portraits  of {people} people who were held out: one face in {metrics['one_face']:.0%},"
        f" eyes, nose and mouth in {metrics['eyes_nose_mouth']:.0%}",
        f"  likeness   the right person first of {people} in {metrics['arcface_rank_1']:.0%}"
        f" (chance {1 / people:.0%}); ArcFace cosine {metrics['arcface_advantage']:.2f} above the"
        " mean of the others",
        f"  sheet      {results.with_suffix('.png')}",
    ]


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


if __name__ == "__main__":
    typer.run(main)
