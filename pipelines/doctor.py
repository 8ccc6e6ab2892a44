"""What runs on which device here, what is missing, and what to type: `make doctor`.

Only the standard library is imported at the top, so that it also runs before `make install`, with
Python 3.10 or later. Exit status: 0 if all packages that are needed are there, else 1.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

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
_DRIVER: Final = "is the driver new enough for that CUDA? nvidia-smi prints what it supports"
_MEMORY_GB: Final = 8  # under which the demo may not run
_SHARED_GB: Final = 1  # under which readers of training samples run out of shared memory
_DISK_GB: Final = 10


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
    advice = "make install PYTHON=python3.11, or 3.12" if wrong else ""
    yield Row("Python", f"{platform.python_version()}, {sys.executable}", advice)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    few = f"the demo needs about {_MEMORY_GB} GB" if pages < _MEMORY_GB else ""
    yield Row("cores, memory", f"{os.cpu_count()} cores, {pages:.0f} GB", few)
    free = shutil.disk_usage(".").free / 1e9
    full = f"weights and the demo need about {_DISK_GB} GB" if free < _DISK_GB else ""
    yield Row("disk", f"{free:.0f} GB free", full)
    shared = Path("/dev/shm")  # noqa: S108
    if shared.is_dir():
        size = shutil.disk_usage(shared).total / 1e9
        small = "in a container: docker run --shm-size=8g" if size < _SHARED_GB else ""
        yield Row("shared memory", f"{size:.1f} GB", small)
    yield Row("NVIDIA GPUs", ", ".join(gpus()) or "none: nvidia-smi lists no GPU")


def gpus() -> list[str]:
    """Returns the names of the GPUs that the driver lists."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=10)
    except subprocess.TimeoutExpired:
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _install() -> str:
    """Returns the command that installs CUDA builds; an install that has none is begun anew."""
    again = "rm -r .venv && " if Path(".venv/.installed-gpu").exists() else ""
    return f"{again}make install GPU=1"


def packages() -> Iterator[Row]:
    """Yields the packages' versions."""
    names = importlib.metadata.packages_distributions()
    for module, purpose in _PACKAGES:
        if importlib.util.find_spec(module) is None:
            yield Row(module, f"missing ({purpose})", "make install", required=True)
            continue
        distributions = sorted(set(names.get(module, [module])))
        versions = [f"{each} {importlib.metadata.version(each)}" for each in distributions]
        both = module == "onnxruntime" and len(versions) > 1
        advice = "two packages of one name: rm -r .venv && make install" if both else ""
        yield Row(module, ", ".join(versions), advice, required=both)
    for module, purpose, command in _OPTIONAL:
        if importlib.util.find_spec(module) is None:
            yield Row(module, f"not installed; only for {purpose}", command)


def devices() -> Iterator[Row]:
    """Yields on which device each step with a model runs, with `device: auto`."""
    with_gpu = bool(gpus())
    torch_state, torch_advice = _torch(with_gpu)
    onnx_state, onnx_advice = _onnx(with_gpu)
    for step in ("detect, embed", "parse", "caption (llava)", "training", "portraits"):
        on_onnx = step == "detect, embed"
        state, advice = (onnx_state, onnx_advice) if on_onnx else (torch_state, torch_advice)
        yield Row(step, state, advice)


def _torch(with_gpu: bool) -> tuple[str, str]:
    """Returns where torch computes, and what to type if it leaves a GPU unused."""
    try:
        import torch
    except ImportError as error:
        return f"nowhere: {error}", "make install"
    if torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda})", ""
    if torch.backends.mps.is_available():
        return "mps (set mixed_precision=no)", ""
    if not with_gpu:
        return "cpu", ""
    if torch.version.cuda is None:
        return f"cpu: torch {torch.__version__} is built without CUDA", _install()
    state = f"cpu: torch {torch.__version__}, for CUDA {torch.version.cuda}, finds no device"
    return state, _DRIVER


def _onnx(with_gpu: bool) -> tuple[str, str]:
    """Returns where onnxruntime runs a small model, and what to type if a GPU is unused."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper

        from stages.backends.runtime import CUDA, onnx_device
    except ImportError as error:
        return f"nowhere: {error}", "make install"
    if onnx_device("auto") == "cpu":
        if not with_gpu:
            return "cpu", ""
        if CUDA in onnxruntime.get_available_providers():
            return "cpu: torch finds no GPU", _DRIVER
        return f"cpu: onnxruntime {onnxruntime.__version__} has no CUDA", _install()
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "neg", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[CUDA])
    if CUDA in session.get_providers():
        return "cuda", ""
    return "cpu: CUDA doesn't start; what it misses is printed above", _install()


def weights() -> Iterator[Row]:
    """Yields which weights of the presets are in the cache."""
    try:
        from configs.load import load
        from configs.schema import DatasetConfig
        from stages.backends.weights import Weights
    except ImportError as error:
        yield Row("weights", f"not looked for: {error}", "make install")
        return
    cache = Weights()
    for preset in ("demo", "fgid"):
        config = load(DatasetConfig, Path("configs/dataset", f"{preset}.yaml"), [])
        names = (config.detect.weights, config.parse.weights, config.embed.weights)
        lacking = [name for name in names if not cache.has(name)]
        state = f"missing: {', '.join(lacking)}" if lacking else "there"
        yield Row(f"weights of {preset}", state, f"make weights PRESET={preset}" if lacking else "")


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
    sections = {title: list(rows()) for title, rows in SECTIONS}
    lacking = [row.what for rows in sections.values() for row in rows if row.required]
    if as_json:
        values = {title: [asdict(row) for row in rows] for title, rows in sections.items()}
        text = json.dumps(values, indent=1)
    else:
        parts = ["\n".join([title, *map(str, rows)]) for title, rows in sections.items()]
        if lacking:
            parts.append(f"missing: {', '.join(lacking)}. Type: make install")
        text = "\n\n".join(parts)
    sys.stdout.write(f"{text}\n")
    return int(bool(lacking))


if __name__ == "__main__":
    raise SystemExit(main())
