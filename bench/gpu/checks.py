"""The table of checks, and running one of them."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any, Final

from bench.gpu import chain, training
from bench.gpu.common import Check, MissingError, Setting, ToleranceError, Values


def lacking(packages: Sequence[str]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


_DATA: Final = ("cv2", "PIL", "pyarrow", "simplejpeg", "skimage", "yaml")
_MODELS: Final = ("torch", "diffusers", "transformers", "accelerate", "safetensors", *_DATA)
_TRAINING: Final = (*_MODELS, "webdataset")
_FACES: Final = ("insightface", "onnxruntime", *_DATA)
CHECKS: Final = {
    "device": Check(run=training.device, packages=("torch",)),
    "parse": Check(run=chain.parse, packages=("torch", "facexlib", *_DATA)),
    "faces": Check(run=chain.faces, packages=_FACES),
    "captions": Check(run=chain.captions, packages=("torch", "transformers", *_DATA)),
    "dataset": Check(run=chain.dataset, packages=("torch", "facexlib", *_FACES)),
    "step": Check(run=training.step, packages=_TRAINING),
    "training": Check(run=training.training, packages=_TRAINING),
    "train_speed": Check(run=training.train_speed, packages=_TRAINING, seconds=240),
    "inference_speed": Check(run=training.inference_speed, packages=_MODELS, seconds=240),
}


def measured(name: str, setting: Setting) -> Values:
    """Runs a check in this process; returns a row: status, detail and values."""
    import torch

    check = CHECKS[name]
    if packages := lacking(check.packages):
        return {"status": "missing", "detail": f"packages {', '.join(packages)}", "values": {}}
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        values = check.run(setting)
    except MissingError as error:
        return {"status": "missing", "detail": str(error), "values": {}}
    except ImportError as error:
        return {"status": "missing", "detail": f"package {error.name}", "values": {}}
    except ToleranceError as error:
        return {"status": "failed", "detail": str(error), "values": error.values}
    finite = all(math.isfinite(value) for value in _numbers(values))
    return {
        "status": "passed" if finite else "failed",
        "detail": "" if finite else "a value isn't finite",
        "values": values,
    }


def _numbers(values: Any) -> list[float]:
    if isinstance(values, dict):
        return [number for value in values.values() for number in _numbers(value)]
    return [values] if isinstance(values, float) else []
