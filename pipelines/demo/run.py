"""`make demo`: the whole chain once, on real faces, each link by the command a user would type.

Stopped at any point, the same command goes on: every link skips what it has already made.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

PROMPTS = ("a portrait of a person in a garden", "a person wearing a red scarf, film photograph")


def main(
    folder: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
    count: Annotated[int, typer.Option(min=8, help="Synthetic portraits to make.")] = 64,
    steps: Annotated[int, typer.Option(help="Training steps; 0: as the preset says.")] = 0,
) -> None:
    """Portraits → shards + report → training → portraits, then a summary."""
    started = time.time()
    photos, data, adapter, made = (
        folder / "photos",
        folder / "dataset",
        folder / "train",
        folder / "portraits",
    )
    _say(1, f"{count} portraits of nobody, one photograph, and a poisoned set")
    _python(
        "pipelines.cli", "synthesize", "--count", str(count), "--seed", "0", "--poison", str(photos)
    )
    _say(2, "photographs → FGID shards and a report")
    _python(
        "pipelines.cli",
        "run",
        "--config",
        "configs/dataset/demo.yaml",
        f"source.path={photos}",
        f"output={data}",
    )
    _say(
        3,
        "shards → adapter (the real classes at tiny size: random weights made here, trained here)",
    )
    length = [f"max_train_steps={steps}"] if steps else []
    _python(
        "train.cli",
        "--config",
        "configs/train/demo.yaml",
        f"data={data}",
        f"output={adapter}",
        *length,
    )
    _say(4, "one photograph and a prompt → portraits")
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    photo = photos / "portrait-0-00000.jpg"
    given = [f"adapter={adapter / 'final'}", f"output={made}"]
    _python(
        "infer.cli", "--config", "configs/infer/demo.yaml", "--photo", str(photo), *prompts, *given
    )
    typer.echo("\n" + "\n".join(_summary(data, adapter, made, time.time() - started)))


def _say(number: int, text: str) -> None:
    typer.secho(f"\n[{number}/4] {text}", bold=True)


def _python(module: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)


def _summary(data: Path, adapter: Path, made: Path, seconds: float) -> list[str]:
    stats: dict[str, Any] = json.loads((data / "report/stats.json").read_text(encoding="utf-8"))
    training: dict[str, Any] = json.loads((adapter / "summary.json").read_text(encoding="utf-8"))
    ledger, speed = stats["data"], stats["runs"]["images_per_second"]
    loss = training["noise_loss"]
    dropped, failed = (sum(ledger[kind].values()) for kind in ("dropped", "failed"))
    portraits = list(made.glob("portrait-*.png"))
    return [
        f"demo finished in {seconds / 60:.1f} minutes",
        f"  ledger    {ledger['inputs']} inputs = {ledger['written']} written + {dropped} "
        f"dropped + {failed} failed",
        *(
            f"              {kind} {reason}: {n}"
            for kind in ("dropped", "failed")
            for reason, n in ledger[kind].items()
        ),
        f"  shards    {len(ledger['shards'])} in {data / 'shards'}"
        + (f", {speed:.1f} images/s" if speed else ""),
        f"  report    {data / 'report/index.html'}",
        f"  training  noise loss {loss['start']:.3f} → {loss['end']:.3f} in {training['steps']} "
        "steps",
        f"  adapter   {adapter / 'final'}",
        f"  portraits {len(portraits)} in {made}; see contact_sheet.png there first",
        "The model is tiny and was trained here in minutes: its portraits show that the chain "
        "works, no more.",
    ]


if __name__ == "__main__":
    typer.run(main)
