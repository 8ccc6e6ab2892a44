"""The small base model that comes with the project, and its pre-trained adapter: model/small.

    README.md      model card
    metrics.json   what `verify` measures
    files.json     sha256 of each file below
    base/          diffusers' layout, half precision
    adapter/       adapter.safetensors, adapter.json

`small` names them wherever a base's or an adapter's folder is given.

    python -m model.base verify      measure both again, and compare with metrics.json
    python -m model.base pack BASE ADAPTER      replace both
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from configs.errors import WeightsError
from configs.load import dump, load
from configs.schema import DatasetConfig

NAME: Final = "small"
FOLDER: Final = Path(__file__).parent / NAME
FILES: Final = "files.json"
METRICS: Final = "metrics.json"
_UNLISTED: Final = (FILES, "README.md", METRICS)
_TOLERANCE: Final = 0.03  # of each metric: processors round differently
_TEXT_TOLERANCE: Final = 0.1  # at most four of 48 portraits


def base_path(base: str) -> str:
    """Returns the folder of the shipped base for its name, and any other folder or hub id as it is.

    Raises what `check_files` raises.
    """
    return _path(base, "base")


def adapter_path(adapter: str) -> str:
    """Returns the folder of the shipped adapter for its name, and any other path as it is.

    Raises what `check_files` raises.
    """
    return _path(adapter, "adapter")


def _path(name: str, part: str) -> str:
    if name != NAME:
        return name
    check_files()
    return str(FOLDER / part)


@cache
def check_files(folder: Path = FOLDER) -> None:
    """Compares the files with files.json; a process does it once.

    Raises WeightsError, which names the first file that is missing or differs.
    """
    how = "Restore it with git: `git checkout -- model/small`."
    try:
        listed = json.loads((folder / FILES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder / FILES} can't be read ({error}). {how}") from error
    for name, expected in listed.items():
        path = folder / name
        if not path.is_file():
            raise WeightsError(f"{path} is missing. {how}")
        digest = _sha256(path)
        if digest != expected:
            raise WeightsError(f"{path} has sha256 {digest}, expected {expected}. {how}")


def write_file_list(folder: Path) -> None:
    """Writes files.json, with the digests of all files of base and adapter."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    digests = {name: _sha256(path) for name, path in names.items() if name not in _UNLISTED}
    (folder / FILES).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_metrics(measures: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics that card and demo state, of the `losses`, `portraits` and, if
    measured, `texts` of `python -m infer.evaluation`.
    """
    losses, portraits = measures["losses"], measures["portraits"]
    arcface, sface = (portraits["resemblance"][name] for name in ("arcface", "sface"))
    intervals = {
        "loss_right": losses["right"],
        "loss_swapped": losses["swapped"],
        "loss_none": losses["none"],
        "one_face": portraits["one_face"],
        "eyes_nose_mouth": portraits["has_parts"],
        "arcface_advantage": arcface["advantage"],
        "arcface_rank_1": arcface["first"],
        "sface_advantage": sface["advantage"],
        "sface_rank_1": sface["first"],
    }
    texts = measures.get("texts", {"with_identity": [], "base": []})
    for prefix, shares in (("text", texts["with_identity"]), ("base_text", texts["base"])):
        for each in shares:
            intervals[f"{prefix}_{each['trait'].replace(' ', '_')}"] = each["asked"]
    return {name: round(float(values["mean"]), 4) for name, values in intervals.items()}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """The small base model that comes with the project, and its adapter."""


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="For the people and their measures.")] = Path(
        "runs/verify"
    ),
) -> None:
    """Measure base and adapter again, on people whom neither was trained on, and compare the
    metrics with those of the model card. About seven minutes on two cores.

    Exit status: 0 if no metric differs by more than 0.03, or by 0.1 for shares of portraits that
    show what their prompt says, of which there are 48.
    """
    check_files()
    people, data = folder / "people", folder / "dataset"
    # of these weights: an interrupted evaluation continues, that of other weights does not
    digest = hashlib.sha256((FOLDER / FILES).read_bytes()).hexdigest()
    measures = folder / f"measures-{digest[:12]}.json"
    for command in (
        f"pipelines.cli synthesize {people} --people 120 --pictures 2 --side 256 --seed 0",
        f"pipelines.cli run --config configs/dataset/people.yaml source.path={people} output={data}"
        " global_pass.val_share=0.5",
        f"infer.evaluation run --config configs/evaluation/small.yaml data={data} output={measures}"
        " measures=[losses,portraits,texts] people=0 images=2 text_people=24"
        " portraits.adapter=small",
    ):
        subprocess.run([sys.executable, "-m", *command.split()], check=True)
    measured = key_metrics(json.loads(measures.read_text(encoding="utf-8")))
    expected = json.loads((FOLDER / METRICS).read_text(encoding="utf-8"))
    for name, value in measured.items():
        typer.echo(f"{name:<20} {value:.4f}, in the model card {expected[name]:.4f}")
    wrong = [
        name
        for name, value in measured.items()
        if abs(value - expected[name]) > (_TEXT_TOLERANCE if "text" in name else _TOLERANCE)
    ]
    if wrong:
        typer.echo(f"differ by more than allowed: {', '.join(wrong)}", err=True)
        raise typer.Exit(1)


@app.command()
def pack(
    base: Annotated[Path, typer.Argument(help="The base/ of a run of make base.")],
    adapter: Annotated[Path, typer.Argument(help="A folder of `python -m model.convert`.")],
) -> None:
    """Replace the weights in model/small. The card and its metrics are to be renewed after it."""
    for needed in (base / "model_index.json", adapter / "adapter.json", adapter / "dataset.yaml"):
        if not needed.is_file():
            raise typer.BadParameter(f"{needed} is missing; nothing was replaced")
    for part, source in (("base", base), ("adapter", adapter)):
        shutil.rmtree(FOLDER / part, ignore_errors=True)
        shutil.copytree(source, FOLDER / part)
    # what depends on the machine: the folders of the training
    config = FOLDER / "adapter/adapter.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    del values["train"]
    values["base"] = NAME
    config.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    dataset = load(DatasetConfig, str(FOLDER / "adapter/dataset.yaml"))
    anonymous = replace(dataset, output="", source=replace(dataset.source, path=""))
    dump(anonymous, FOLDER / "adapter/dataset.yaml")
    write_file_list(FOLDER)
    size = sum(path.stat().st_size for path in FOLDER.rglob("*.safetensors"))
    typer.echo(f"{FOLDER}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    app()
