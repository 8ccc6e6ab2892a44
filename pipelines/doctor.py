"""What runs on which device here, what is missing, and what to type: `make doctor`.

What is imported at the top needs no package, so that it also runs before `make install`, with
Python 3.10 or later. Exit status: 1 if something that is needed is missing or fails, else 0.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Final

from stages.backends.runtime import CUDA, has_nvidia_driver, onnx_device

_PACKAGES: Final = (  # module → what it is used for
    *(("torch", "models"), ("transformers", "CLIP, LLaVA"), ("diffusers", "Stable Diffusion")),
    *(("accelerate", "training"), ("onnxruntime", "face models"), ("insightface", "face models")),
    *(("facexlib", "parsing"), ("cv2", "images"), ("pyarrow", "tables"), ("webdataset", "shards")),
    *(("ray", "clusters"),),
)
_OPTIONAL: Final = (  # module, what it is used for, how to get it
    ("bitsandbytes", "8-bit Adam, captions in 4 bits", ".venv/bin/pip install bitsandbytes"),
    ("wandb", "report_to=wandb", ".venv/bin/pip install wandb"),
    ("s3fs", "data on S3", ".venv/bin/pip install s3fs"),
)
_PYTHON: Final = ((3, 11), (3, 12))  # versions that the project runs with
_NEW_DRIVER: Final = "is the driver new enough for that CUDA? nvidia-smi prints what it supports"
_REPAIR_DRIVER: Final = "install the NVIDIA driver again, or restart the machine after an update"
_MEMORY_GB: Final = 8  # under which the demo may not run
_SHARED_GB: Final = 1  # under which readers of training samples run out of shared memory
_DISK_GB: Final = 10  # an install with CUDA builds takes 7.3 GB


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the output.

    what: name of a device, package or step. state: its version, or the device it runs on. advice: a
    command that helps, or "". required: whether a problem with it makes the exit status 1.
    """

    what: str
    state: str
    advice: str = ""
    required: bool = False

    def __str__(self) -> str:
        return f"  {self.what:<22} {self.state}{f'  → {self.advice}' if self.advice else ''}"


def machine() -> Iterator[Row]:
    """Yields what the machine has."""
    wrong = sys.version_info[:2] not in _PYTHON
    state = f"{platform.python_version()}{' (3.11 or 3.12 is needed)' if wrong else ''}"
    advice = f"{_install()} PYTHON=python3.11" if wrong else ""
    yield Row("Python", f"{state}, {sys.executable}", advice, required=wrong)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    few = f"the demo needs about {_MEMORY_GB} GB" if pages < _MEMORY_GB else ""
    yield Row("cores, memory", f"{os.cpu_count()} cores, {pages:.0f} GB", few)
    free = shutil.disk_usage(".").free / 1e9
    full = f"an install and the demo need up to {_DISK_GB} GB" if free < _DISK_GB else ""
    yield Row("disk", f"{free:.0f} GB free", full)
    shared = Path("/dev/shm")  # noqa: S108
    if shared.is_dir():
        size = shutil.disk_usage(shared).total / 1e9
        small = "in a container: docker run --shm-size=8g" if size < _SHARED_GB else ""
        yield Row("shared memory", f"{size:.1f} GB", small)
    yield Row("NVIDIA GPUs", *_gpus())


def _gpus() -> tuple[str, str]:
    """Returns what nvidia-smi says of the GPUs, and what to do if it fails."""
    if not has_nvidia_driver():
        return "none: neither nvidia-smi nor /dev/nvidiactl is here", ""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=10)
    except FileNotFoundError:
        return "a driver, by /dev/nvidiactl; nvidia-smi, which lists GPUs, isn't installed", ""
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi fails: {error}", _REPAIR_DRIVER
    lines = (done.stdout + done.stderr).split("\n")
    state = ", ".join(line.strip() for line in lines if line.strip())
    if done.returncode != 0 or not state:
        return f"nvidia-smi fails with {done.returncode}: {state}", _REPAIR_DRIVER
    return state, ""


def _install(kind: str = "") -> str:
    """Returns the command that installs packages, or builds of a kind ("-gpu").

    make takes an environment with the mark of this kind for complete, so that is deleted first.
    """
    complete = any(Path(sys.prefix).glob(f".installed{kind}*"))
    return f"{'rm -r .venv && ' if complete else ''}make install{' GPU=1' if kind else ''}"


def _checked(what: str, check: Callable[[], Row]) -> Row:
    """Returns a check's row, or one with its error: a broken package may raise any. Errors of
    imports and of loading libraries ask for an install.
    """
    try:
        return check()
    except Exception as error:  # noqa: BLE001
        text = " ".join(str(error).split())
        is_broken = isinstance(error, ImportError | OSError)
        advice = _install() if is_broken else ""
        return Row(what, f"fails: {type(error).__name__}: {text}", advice, required=True)


@cache
def _distributions() -> Mapping[str, list[str]]:
    """Returns module → the distributions that contain it."""
    return importlib.metadata.packages_distributions()


def packages() -> Iterator[Row]:
    """Yields the packages' versions."""
    for module, purpose in _PACKAGES:
        yield _checked(module, partial(_package, module, purpose))
    for module, purpose, command in _OPTIONAL:
        if importlib.util.find_spec(module) is None:
            yield Row(module, f"not installed; only for {purpose}", command)


def _package(module: str, purpose: str) -> Row:
    if importlib.util.find_spec(module) is None:
        return Row(module, f"missing ({purpose})", _install(), required=True)
    names = sorted(set(_distributions().get(module, [module])))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    if module == "onnxruntime" and len(names) > 1:
        return Row(module, f"two packages of one name: {versions}", _install(), required=True)
    return Row(module, versions)


def devices() -> Iterator[Row]:
    """Yields on which device each step with a model runs, with `device: auto`."""
    onnx, torch = _checked("onnxruntime", _onnx), _checked("torch", _torch)
    yield replace(onnx, what="detect, embed")
    for step in ("parse", "caption (llava)", "training", "portraits"):
        yield replace(torch, what=step)


def _torch() -> Row:
    """Returns where torch computes, and what to type if it leaves a GPU unused."""
    import torch

    row = partial(Row, "torch")
    if torch.cuda.is_available():
        return row(f"cuda ({torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda})")
    if torch.backends.mps.is_available():
        return row("mps (set mixed_precision=no)")
    if not has_nvidia_driver():
        return row("cpu")
    if torch.version.cuda is None:
        return row(f"cpu: torch {torch.__version__} is built without CUDA", _install("-gpu"))
    state = f"cpu: torch {torch.__version__}, for CUDA {torch.version.cuda}, finds no device"
    return row(state, _NEW_DRIVER)


def _onnx() -> Row:
    """Returns where onnxruntime runs a small model, and what to type if a GPU is unused."""
    import onnxruntime
    from onnx import TensorProto, helper

    row = partial(Row, "onnxruntime")
    if onnx_device("auto") == "cpu":
        if not has_nvidia_driver():
            return row("cpu")
        if CUDA in onnxruntime.get_available_providers():
            return row("cpu: torch finds no GPU", _NEW_DRIVER)
        return row(f"cpu: onnxruntime {onnxruntime.__version__} has no CUDA", _install("-gpu"))
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "neg", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[CUDA])
    if CUDA in session.get_providers():
        return row("cuda")
    return row("cpu: CUDA doesn't start; what it misses is printed above", _install("-gpu"))


def weights() -> Iterator[Row]:
    """Yields which weights of the presets are in the cache."""
    for preset in ("demo", "fgid"):
        yield _checked(f"weights of {preset}", partial(_weights, preset))


def _weights(preset: str) -> Row:
    from configs.load import load
    from configs.schema import DatasetConfig
    from stages.backends.weights import Weights

    config = load(DatasetConfig, Path("configs/dataset", f"{preset}.yaml"), [])
    names = (config.detect.weights, config.parse.weights, config.embed.weights)
    cached = Weights()
    lacking = [name for name in names if not cached.has(name)]
    state = f"missing: {', '.join(lacking)}" if lacking else "there"
    return Row(f"weights of {preset}", state, f"make weights PRESET={preset}" if lacking else "")


SECTIONS: Final[tuple[tuple[str, Callable[[], Iterator[Row]]], ...]] = (
    ("machine", machine),
    ("packages", packages),
    ("where models run, with device: auto", devices),
    ("weights, which are also fetched when they are needed", weights),
)


def main() -> int:
    """Prints all sections; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args().json
    with contextlib.redirect_stdout(sys.stderr):  # packages print, such as onnxruntime its errors
        sections = {title: list(rows()) for title, rows in SECTIONS}
    problems = [row for rows in sections.values() for row in rows if row.required]
    if as_json:
        values = {title: [asdict(row) for row in rows] for title, rows in sections.items()}
        text = json.dumps(values, indent=1)
    else:
        parts = ["\n".join([title, *map(str, rows)]) for title, rows in sections.items()]
        if problems:
            names = ", ".join(row.what for row in problems)
            advice = next((f" Type: {row.advice}" for row in problems if row.advice), "")
            parts.append(f"missing or failing: {names}.{advice}")
        text = "\n\n".join(parts)
    sys.stdout.write(f"{text}\n")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
